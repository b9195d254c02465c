"""`python -m fsdfm_jax COMMAND`, the same as `fsdfm COMMAND`."""

from fsdfm_jax import cli

if __name__ == "__main__":
    cli.main()

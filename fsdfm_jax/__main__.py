"""The console command `fsdfm`, the same as `python -m fsdfm_jax`.

Imports take seconds; Ctrl-C during them ends as it does later, with one line.
"""

import sys

STOPPED = 143  # as `processes.STOPPED`, which takes an import


def main() -> None:
    """Runs the program that the command line names."""
    try:
        from fsdfm_jax import cli

        cli.main()
    except KeyboardInterrupt:
        print("stopped by Ctrl-C: nothing was begun.", file=sys.stderr)
        sys.exit(STOPPED)


if __name__ == "__main__":
    main()

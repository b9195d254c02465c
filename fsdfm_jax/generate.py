r"""Generate text with any model: unconditionally, after a prompt, or in the gaps of a text.

    python -m fsdfm_jax.generate --steps=8
    python -m fsdfm_jax.generate --workdir=runs/tiny --steps=8 --prompt="My fellow citizens"
    python -m fsdfm_jax.generate --checkpoint=model.safetensors --tokenizer=gpt2 \
        --infill="The [8] of the Union" --stream
    python -m fsdfm_jax.generate --workdir=runs/tiny --batch_file=prompts.jsonl --output=texts.jsonl

Without --workdir and --checkpoint, the bundled model is used.

In --infill, [n] is a gap of n tokens. With --batch_file or --output, each sample is one line of
JSON, its text in "text". The rows of all requests are drawn in batches of one shape; the
same arguments, including --batch_size, give the same tokens. An interrupted --output can be
resumed.
"""

# Only a program: importing this module would hide the function `fsdfm_jax.generate`.
if __name__ == "__main__":
    from absl import flags

    from fsdfm_jax import cli, samples

    samples.define_flags()
    flags.adopt_module_key_flags(samples)  # for --help
    cli.run(
        samples.main,
        kept="lines in --output are kept; run the same command to resume",
    )

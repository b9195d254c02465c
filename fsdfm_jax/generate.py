r"""Text out of any model, from nothing, after a prompt or in the gaps of a text.

    python -m fsdfm_jax.generate --steps=8
    python -m fsdfm_jax.generate --workdir=runs/tiny --steps=8 --prompt="My fellow citizens"
    python -m fsdfm_jax.generate --checkpoint=model.safetensors --tokenizer=gpt2 \
        --infill="The [8] of the Union" --stream
    python -m fsdfm_jax.generate --workdir=runs/tiny --batch_file=prompts.jsonl --output=texts.jsonl

Without --workdir and --checkpoint, the bundled model is used.

inference/prompts.py has the syntax of gaps and of batch files. With a batch file or an output, each
sample is one line of JSON. The rows of all requests are drawn in batches of one shape; the same
arguments, --batch_size included, give the same tokens. An interrupted --output resumes where it
ended.
"""

# A program and nothing else: imported, this module would hide the function `fsdfm_jax.generate`.
if __name__ == "__main__":
    from absl import flags

    from fsdfm_jax import cli, samples

    samples.define_flags()
    flags.adopt_module_key_flags(samples)  # what --help lists
    cli.run(
        samples.main,
        kept="lines in --output are kept; the same command goes on from there",
    )

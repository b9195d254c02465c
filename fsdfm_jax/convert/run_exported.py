"""Draw text from the exported sampler in this folder.

    pip install -r requirements.txt
    python run.py --prompt "It was" --num_samples 2 --seed 1
    python run.py --infill "The [8] of the Union" --steps 8

config.json describes the inputs of the programs. Weights and numbers are inputs, so other weights
of the same shapes and other temperatures work too.
A program (.jaxexport) is code: run it only if you trust its origin.
"""

import argparse
import json
import pathlib
import sys
import types

sys.dont_write_bytecode = True  # don't change this folder

import numpy as np  # noqa: E402
import safetensors.numpy  # noqa: E402
import tokenizers  # noqa: E402
from jax import export  # noqa: E402

FOLDER = pathlib.Path(__file__).resolve().parent


def sample(given_BL: np.ndarray, frozen_BL: np.ndarray, *, steps: int, seed: int, **numbers):
    """Draw token ids, int32 [B, L]; frozen positions (bool) are fixed to `given_BL` (int32).

    `numbers`, such as "temperature", override those of config.json.
    """
    config = json.loads((FOLDER / "config.json").read_text(encoding="utf-8"))
    numbers = config["sampling"] | numbers
    program = export.deserialize(bytearray((FOLDER / f"sampler-{steps}.jaxexport").read_bytes()))
    weights = safetensors.numpy.load_file(FOLDER / "model.safetensors")
    values = {"weights": weights, "seed": np.uint32(seed), "given": given_BL, "frozen": frozen_BL}
    values |= {
        name: np.float32(value)
        for name, value in numbers.items()
        if name not in values and not isinstance(value, str)
    }
    return np.asarray(program.call(*(values[name] for name in config["inputs"])))


def main() -> None:
    config = json.loads((FOLDER / "config.json").read_text(encoding="utf-8"))
    length, offered = config["length"], config["steps"]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, choices=offered, default=offered[0])
    parser.add_argument("--prompt", help="text at the start of every sample")
    parser.add_argument("--infill", help="text with gaps of n tokens: 'The [8] of the Union'")
    parser.add_argument("--num_samples", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same text")
    parser.add_argument("--temperature", type=float, default=config["sampling"]["temperature"])
    args = parser.parse_args()
    if not 0 <= args.seed < 2**32:
        parser.error(f"--seed must be in [0, 2^32), got {args.seed}")
    if not 0 <= args.temperature < np.finfo(np.float32).max:
        parser.error(f"--temperature must be at least 0 and finite, got {args.temperature}")
    if args.num_samples < 1:
        parser.error(f"--num_samples must be at least 1, got {args.num_samples}")
    if args.prompt is not None and args.infill is not None:
        parser.error("--prompt and --infill exclude each other; give only one of them")

    tokenizer, shown = None, length
    given_BL = np.zeros((args.num_samples, length), np.int32)
    frozen_BL = np.zeros(given_BL.shape, bool)
    if (FOLDER / "tokenizer.json").exists():
        tokenizer = tokenizers.Tokenizer.from_file(str(FOLDER / "tokenizer.json"))
        tokenizer.encode_special_tokens = True  # "<|endoftext|>" in a prompt is text
        encode = lambda text: tokenizer.encode(text, add_special_tokens=False).ids
        if args.prompt is not None or args.infill is not None:
            import prompts

            kind = "prompt" if args.infill is None else "infill"
            encoder = types.SimpleNamespace(encode=encode)
            try:
                template = prompts.MAKERS[kind](getattr(args, kind), encoder, length)
            except ValueError as error:
                parser.error(str(error))
            given_BL[:], frozen_BL[:], shown = template
    elif args.prompt is not None or args.infill is not None:
        parser.error("there is no tokenizer in this folder: omit --prompt and --infill")

    numbers = {"temperature": args.temperature}
    tokens_BL = sample(given_BL, frozen_BL, steps=args.steps, seed=args.seed, **numbers)
    for i, tokens in enumerate(tokens_BL[:, :shown].tolist()):
        print("----" if i else "", end="\n" if i else "")
        print(tokenizer.decode(tokens) if tokenizer else tokens)


if __name__ == "__main__":
    main()

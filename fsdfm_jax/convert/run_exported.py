"""Draws text from the exported sampler in this folder; needs jax, numpy and tokenizers, no more.

    python run.py --prompt "It was" --num_samples 2 --seed 1

signature.json says what the program takes and gives. Weights, time grid and temperature are inputs:
other weights of the same shapes and other grids of the same number of steps work with it as well.
The program (sampler.jaxexport) is code: run it only if you trust where it came from.
"""

import argparse
import json
import pathlib
import sys

import numpy as np
import tokenizers
from jax import export

FOLDER = pathlib.Path(__file__).resolve().parent
# jax.export reads programs with flatbuffers, which `pip install jax` doesn't bring; at the end of
# the path, so that one that is installed goes first.
sys.path.append(str(FOLDER / "flatbuffers.zip"))


def sample(prompt: list[int], num_samples: int, seed: int, temperature: float) -> np.ndarray:
    """Token ids, int32 [B, L]: B = `num_samples` samples, each beginning with `prompt`."""
    signature = json.loads((FOLDER / "signature.json").read_text(encoding="utf-8"))
    program = export.deserialize(bytearray((FOLDER / "sampler.jaxexport").read_bytes()))
    with np.load(FOLDER / "weights.npz") as arrays:
        weights = dict(arrays)  # "blocks/q_proj/kernel" -> float32 array
    length, steps = signature["length"], signature["steps"]
    if len(prompt) >= length or num_samples < 1 or not temperature > 0:
        sys.exit(f"Expected a prompt below {length} tokens, num_samples >= 1 and temperature > 0.")
    given_BL = np.zeros((num_samples, length), np.int32)  # tokens of the frozen positions
    given_BL[:, : len(prompt)] = prompt
    frozen_BL = np.broadcast_to(np.arange(length) < len(prompt), given_BL.shape)
    # Cumulative times that increase from 0 (noise) to 1 (text); any spacing will do.
    grid_S1 = (np.arange(steps + 1) / steps).astype(np.float32)
    numbers = grid_S1, np.float32(temperature)
    return np.asarray(program.call(weights, np.uint32(seed), given_BL, frozen_BL, *numbers))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompt", default="", help="text that every sample begins with")
    parser.add_argument("--num_samples", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same text")
    parser.add_argument("--temperature", type=float, default=1.0, help="below 1 is more cautious")
    args = parser.parse_args()
    if not (FOLDER / "tokenizer.json").exists():  # without one there is nothing but token ids
        print(*sample([], args.num_samples, args.seed, args.temperature).tolist(), sep="\n")
        return
    tokenizer = tokenizers.Tokenizer.from_file(str(FOLDER / "tokenizer.json"))
    tokenizer.encode_special_tokens = True  # "<|endoftext|>" in a prompt is text, as in training
    prompt = tokenizer.encode(args.prompt, add_special_tokens=False).ids
    tokens_BL = sample(prompt, args.num_samples, args.seed, args.temperature)
    print(*tokenizer.decode_batch(tokens_BL.tolist()), sep="\n----\n")


if __name__ == "__main__":
    main()

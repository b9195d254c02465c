"""Draws text from the exported sampler in this folder; needs jax, numpy and tokenizers, no more.

    python run.py --prompt "It was" --num_samples 2 --seed 1

signature.json says what the program takes and gives. Weights and all that has a default there are
inputs: other weights of the same shapes, other times of as many steps (increasing from 0, noise, to
1, text) and another temperature work with it as well.
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
sys.path.insert(0, str(FOLDER))  # ngrams.py, of which nothing is to be left here
sys.dont_write_bytecode = True


def sample(
    prompt: list[int], num_samples: int, seed: int, temperature: float | None = None
) -> np.ndarray:
    """Token ids, int32 [B, L]: B = `num_samples` samples, each beginning with `prompt`."""
    signature = json.loads((FOLDER / "signature.json").read_text(encoding="utf-8"))
    program = export.deserialize(bytearray((FOLDER / "sampler.jaxexport").read_bytes()))
    values = {name: np.float32(value) for name, value in signature["defaults"].items()}
    if temperature is not None:
        values["temperature"] = np.float32(temperature)
    length = signature["length"]
    if len(prompt) >= length or num_samples < 1 or not values["temperature"] > 0:
        sys.exit(f"Expected a prompt below {length} tokens, num_samples >= 1 and temperature > 0.")
    with np.load(FOLDER / "weights.npz") as arrays:
        values["weights"] = dict(arrays)  # "blocks/q_proj/kernel" -> float32 array
    values["seed"] = np.uint32(seed)
    values["given"] = np.zeros((num_samples, length), np.int32)  # tokens of the frozen positions
    values["given"][:, : len(prompt)] = prompt
    values["frozen"] = np.broadcast_to(np.arange(length) < len(prompt), (num_samples, length))
    if signature["contexts"] is not None:  # what follows what in the text, which draws heed
        import ngrams

        with np.load(FOLDER / "neighbours.npz") as arrays:
            counts = ngrams.Counts(**arrays)
        values["table"] = ngrams.table(counts, signature["model"]["vocab_size"])._asdict()
    return np.asarray(program.call(*(values[entry["name"]] for entry in signature["inputs"])))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompt", default="", help="text that every sample begins with")
    parser.add_argument("--num_samples", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same text")
    parser.add_argument("--temperature", type=float, help="below 1 is more cautious")
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

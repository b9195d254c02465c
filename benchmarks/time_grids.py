"""Time grids under an exact posterior: what steps cost when the network makes no error.

    python -m benchmarks.time_grids                                     4x4 Sudoku; a minute
    python -m benchmarks.time_grids --law=runs/data/hmm/law.npz         a hidden Markov language

The base model is the posterior itself: a sum over all 288 grids, or forward-backward passes.
`python -m fsdfm_jax.exact --task=hmm` makes the law. What is left is the error of few steps alone:
positions that are drawn together don't see each other. Samples are judged as in the report.
"""

import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from benchmarks import measure
from configs import base
from fsdfm_jax.exact import grids as sudoku_grids
from fsdfm_jax.exact import hmm, hmm_judge, hmm_posterior, sudoku, sudoku_judge
from fsdfm_jax.flow import sampler
from fsdfm_jax.flow.process import Process
from fsdfm_jax.flow.sampling import Sampling
from fsdfm_jax.flow.teacher import Denoise

_BATCH = 64
_LENGTH = 128  # tokens of a sample of the language


def define_flags(values: flags.FlagValues = flags.FLAGS) -> None:
    """Defines the flags; the program does, importing this file doesn't."""
    names = ["uniform", "geometric:0.1", "geometric:0.01", "geometric:0.001", "geometric:0.0001"]
    flags.DEFINE_string("law", "", "A law.npz; 4x4 Sudoku without it.", flag_values=values)
    flags.DEFINE_list("few", ["2", "4", "8", "16"], "Numbers of steps.", flag_values=values)
    flags.DEFINE_list("grids", names, "Time grids.", flag_values=values)
    flags.DEFINE_list("temperatures", ["1"], "Temperatures.", flag_values=values)
    flags.DEFINE_integer(
        "samples", 1024, "Samples of a point.", lower_bound=_BATCH, flag_values=values
    )
    flags.DEFINE_string("table", "", "A .csv file to write.", flag_values=values)


def enumerated(sequences_ML: np.ndarray, num_tokens: int) -> Denoise:
    """The exact posterior under a law that is uniform over M sequences, where kappa(t) = t.

    >>> import jax, jax.numpy as jnp, numpy as np
    >>> from benchmarks import time_grids
    >>> denoise = time_grids.enumerated(np.array([[0, 0], [1, 1]]), 2)
    >>> logits = denoise(jnp.array([[0, 1]]), jnp.array([0.5]), None)
    >>> jax.nn.softmax(logits)[0].tolist()  # 0 and 1 speak for either sequence
    [[0.5, 0.5], [0.5, 0.5]]

    Args:
      sequences_ML: int [M, L].
      num_tokens: V.

    Returns:
      (xt_BL, t_B, h_B) -> logits float32 [B, L, V].
    """
    known_ML = jnp.asarray(sequences_ML)
    known_MLV = jax.nn.one_hot(known_ML, num_tokens)

    def denoise(xt_BL, t_B, h_B):
        del h_B
        kept_B1 = jnp.minimum(t_B, 1.0 - 1e-6)[:, None]
        equal_BM = jnp.sum(known_ML[None] == xt_BL[:, None], axis=-1)
        evidence_BM = equal_BM * jnp.log1p(num_tokens * kept_B1 / (1.0 - kept_B1))
        posterior_BLV = jnp.einsum("bm,mlv->blv", jax.nn.softmax(evidence_BM), known_MLV)
        return jnp.log(jnp.maximum(posterior_BLV, 1e-30))

    return denoise


def draw(
    denoise: Denoise, process: Process, length: int, sampling: Sampling, count: int
) -> np.ndarray:
    """Samples, int [N, L] with N = count, rounded up to whole batches."""
    jump, wrapped = process.make_jump(sampling.rule), sampling.wrap(denoise)

    @jax.jit
    def batch(key):
        noise_key, key = jax.random.split(key)
        x0_BL = process.source.sample(noise_key, (_BATCH, length))
        return sampler.sample(key, wrapped, jump, process.finalize, x0_BL, sampling.times())

    keys = jax.random.split(jax.random.key(0), -(-count // _BATCH))
    return np.concatenate([np.asarray(batch(key)) for key in keys])


def _sudoku() -> tuple[Denoise, Process, int, Callable[[np.ndarray], dict[str, Any]]]:
    size = sudoku.get_size("4x4")
    cells = sudoku_grids.all_grids(size)
    ends = np.full((len(cells), 1), size.n)  # the end of the text
    sequences_ML = np.concatenate([cells.reshape(len(cells), -1), ends], axis=1)
    num_tokens = size.n + 1

    def judge(tokens_NL):
        report = sudoku_judge.judge(size, tokens_NL)
        names = ("valid", "total_variation")
        row = {name: report.figures[name].value for name in names}
        return row | {"expected_total_variation": report.expected["total_variation"]}

    process = measure.make_process(base.get_config(), num_tokens)
    return enumerated(sequences_ML, num_tokens), process, sequences_ML.shape[1], judge


def _language(path: str) -> tuple[Denoise, Process, int, Callable[[np.ndarray], dict[str, Any]]]:
    law = hmm.load(path)
    process = measure.make_process(base.get_config(), law.vocab_size)

    def judge(tokens_NL):
        figures = hmm_judge.judge(law, tokens_NL).figures
        return {name: figures[name].value for name in ("excess", "kl_1", "kl_2", "entropy_2")}

    denoise = hmm_posterior.make_denoiser(law, process.schedule, process.source)
    return denoise, process, _LENGTH, judge


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"Unexpected arguments: {argv[1:]}")
    given = flags.FLAGS
    denoise, process, length, judge = _language(given.law) if given.law else _sudoku()
    rows = []
    for steps in map(int, given.few):
        for name in given.grids:
            for temperature in map(float, given.temperatures):
                sampling = Sampling(steps, "mixture", name, temperature=temperature)
                tokens_NL = draw(denoise, process, length, sampling, given.samples)
                row = {"steps": steps, "grid": name, "temperature": temperature}
                rows.append(row | judge(tokens_NL))
    measure.print_table(rows)
    if given.table:
        measure.write_csv(pathlib.Path(given.table), rows)


if __name__ == "__main__":
    define_flags()
    app.run(main)

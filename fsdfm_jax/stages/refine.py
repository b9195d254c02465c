"""Third few-step stage: tune how each iteration moves, by rectified coupling (arXiv:2507.15897).

With independent noise and text, one big step has to average over everything the noise could become.
Here the many-step sampler of the model at hand turns noise x0 into text x1, and the same losses are
trained on those pairs: x0 then says where its text is, the posterior is sharper at small t, and
fewer, steadier steps reach the end. A further round (the stage named again in the pipeline) makes
its pairs with the refined model. A share of real text with independent noise keeps the errors of
the generator from piling up.

Needs a source that carries randomness: with a mask source every x0 is the same and there is nothing
to couple.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from fsdfm_jax.flow import sampler
from fsdfm_jax.flow.process import Process
from fsdfm_jax.flow.sampling import Sampling
from fsdfm_jax.network import model as model_lib
from fsdfm_jax.network.config import ModelConfig
from fsdfm_jax.network.model import Params
from fsdfm_jax.parallel import rules
from fsdfm_jax.stages import few_step
from fsdfm_jax.stages.base import Stage, start_from_base


class PairSettings(NamedTuple):
    """How pairs are made.

    Attributes:
      num_pairs: in all.
      batch_size: pairs made at once.
      sampling: the many-step sampler that makes them.
    """

    num_pairs: int
    batch_size: int
    sampling: Sampling


def read_pair_settings(config: ConfigDict) -> PairSettings:
    """The settings of a stage's config.

    Raises:
      ValueError: unless pairs come in whole batches, or for a value that `Sampling` refuses.
    """
    if config.num_pairs % config.pair_batch_size:
        raise ValueError(
            f"refine.num_pairs={config.num_pairs} must be a multiple of "
            f"refine.pair_batch_size={config.pair_batch_size}."
        )
    try:
        sampling = Sampling.from_dict(config.pairs)
    except ValueError as error:
        raise ValueError(f"refine.pairs: {error}") from None
    return PairSettings(config.num_pairs, config.pair_batch_size, sampling)


def make_pair_sampler(
    model: ModelConfig,
    process: Process,
    settings: PairSettings,
    *,
    length: int,
    sharding: jax.sharding.Sharding | None = None,
) -> Callable[[Params, jax.Array], tuple[jax.Array, jax.Array]]:
    """A jitted (params, key) -> (x0_BL, x1_BL), int32 [settings.batch_size, length] each.

    `sharding` is that of what it returns; rows are spread over the mesh while it runs.
    """
    sampling = settings.sampling
    jump, grid = process.make_jump(sampling.rule), sampling.times()

    @functools.partial(jax.jit, out_shardings=sharding)
    def make_pairs(params, key):
        noise_key, sample_key = jax.random.split(key)
        x0_BL = process.source.sample(noise_key, (settings.batch_size, length))
        x0_BL = rules.constrain(x0_BL, "rows")
        denoise = sampling.wrap(functools.partial(model_lib.predict, params, model))
        x1_BL = sampler.sample(sample_key, denoise, jump, process.finalize, x0_BL, grid)
        return x0_BL, x1_BL

    return make_pairs


def mix_real(
    pairs: tuple[np.ndarray, np.ndarray],
    real_BL: np.ndarray,
    *,
    source_size: int,
    real_fraction: float,
    seed: int,
    step: int,
) -> dict[str, np.ndarray]:
    """The batch of a step: pairs drawn with replacement, and real text with fresh noise.

    Args:
      pairs: (x0, x1), int [N, L] each.
      real_BL: a batch of real text, int32 [B, L], of which the first round(B real_fraction) rows
        are used.
      source_size: ids that uniform noise ranges over.
      real_fraction: in [0, 1].
      seed, step: all the randomness there is, so that a resumed run sees the same batches.

    Returns:
      {"x0", "x1"}: int32 [B, L], rows in random order.
    """
    generator = np.random.Generator(np.random.Philox(key=[seed, step]))
    batch_size = len(real_BL)
    num_real = round(batch_size * real_fraction)
    chosen = generator.integers(len(pairs[0]), size=batch_size - num_real)
    noise = generator.integers(source_size, size=(num_real, real_BL.shape[1]))
    order = generator.permutation(batch_size)
    x0 = np.concatenate([noise, pairs[0][chosen]])[order]
    x1 = np.concatenate([real_BL[:num_real], pairs[1][chosen]])[order]
    return {"x0": x0.astype(np.int32), "x1": x1.astype(np.int32)}


def make(config: ConfigDict, model: ModelConfig, process: Process) -> Stage:
    """The stage; reads the budget, teacher and pair keys of its config.

    Raises:
      ValueError: for a mask source, or pairs that don't come in whole batches.
    """
    if process.source.mask_id is not None:
        raise ValueError(
            "Stage 'refine' couples noise and text and needs path.source='uniform'; a mask "
            "source has only one noise. Leave 'refine' out of the pipeline."
        )
    read_pair_settings(config)
    below, above = few_step.split_budgets(config, "refine")
    few_step.rows_of_path(config.batch_size // config.accumulate, below, above)
    path = few_step.read_path_term(config, below)
    taught = few_step.read_teacher_term(config, above, process) if above.log2_steps else None
    loss = few_step.make_loss(model, process, path, taught)
    return Stage("refine", model, start_from_base("refine", model), loss)

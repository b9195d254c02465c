"""Third few-step stage: tune how each step moves, by matching the law of its outcome.

A shortcut teacher hands a big step the product of its marginals, which no big step can be right
with: tokens drawn together don't know of each other. Here the tokens that a step writes *together*
are compared with the path's law at that time, with no target for a single position; see
`fsdfm_jax.flow.matching` for the equations. Two networks learn in turns:

    the student    moves so that its outcomes look like the path's to the base model
    an auxiliary   learns to tell how the student's outcomes look; it isn't used afterwards

Steps begin where the student's own steps end, from noise on, so that what a step leaves wrong is
seen by the next. No text is read: all that is known of it is in the base model. Only a network
that marks given tokens takes these from the text, and samples the rest.

The student is sampled as it is trained: with the rule `mixture`, on `refine.grid`. Needs a
uniform source: a mask source has no noise to carry what positions agree on.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from fsdfm_jax.flow import grids, jumps, matching, paths, schedules
from fsdfm_jax.flow.jumps import Jump
from fsdfm_jax.flow.process import Process
from fsdfm_jax.flow.teacher import Denoise
from fsdfm_jax.network import model as model_lib
from fsdfm_jax.network.config import ModelConfig
from fsdfm_jax.parallel import rules
from fsdfm_jax.stages.base import (
    Auxiliary,
    Frozen,
    Stage,
    draw_frozen,
    mean_loss,
    start_from_base,
)


class Starts(NamedTuple):
    """Where steps begin, rows of all budgets.

    Attributes:
      z_BL: the student's own states, int [B, L].
      t_B, h_B: times and widths, float32 [B].
      frozen_BL: given positions, bool [B, L]; None: none.
    """

    z_BL: jax.Array
    t_B: jax.Array
    h_B: jax.Array
    frozen_BL: jax.Array | None = None


class Ends(NamedTuple):
    """Where steps end, with more noise.

    Attributes:
      zs_BL: int [B, L].
      share_B: b, the share of positions that the step drew from the student's answer.
      end_B: kappa(t+h).
      again_B: r, the share of positions that show where the step ended.
      kept_B: s = r kappa(t+h).
    """

    zs_BL: jax.Array
    share_B: jax.Array
    end_B: jax.Array
    again_B: jax.Array
    kept_B: jax.Array


def count_samples(batch_size: int, max_log2_steps: int) -> int:
    """How many samples of each number of steps are walked at once to fill a batch.

    >>> from fsdfm_jax.stages import refine
    >>> refine.count_samples(64, 3)  # of 1, 2, 4 and 8 steps; 8 rows of each sample
    2

    Raises:
      ValueError: unless all numbers of steps can have the same number of rows.
    """
    per_sample = (max_log2_steps + 1) * 2**max_log2_steps
    samples, rest = divmod(batch_size, per_sample)
    if rest or not samples:
        raise ValueError(
            f"A part of refine's batch of {batch_size} rows must be a multiple of {per_sample}: "
            f"samples of 1, 2 .. {2**max_log2_steps} steps are walked, each step a row. Change "
            "refine.batch_size, refine.accumulate or refine.max_log2_steps."
        )
    return samples


def walk(
    key: jax.Array,
    denoise: Denoise,
    jump: Jump,
    process: Process,
    *,
    max_log2_steps: int,
    grid: str,
    samples: int,
    given_CL: jax.Array,
    frozen_CL: jax.Array | None = None,
) -> Starts:
    """The states that steps start from, along samples of 1, 2, 4 .. 2^K steps.

    All samples take 2^K steps side by side; those of fewer steps restart from noise.

    Args:
      key: typed PRNG key.
      denoise: (x_BL, t_B, h_B) -> logits, given the same tokens.
      jump: the rule of the steps.
      process: gives the noise.
      max_log2_steps: K.
      grid: name of the time grid, see `grids.make_grid`.
      samples: of each number of steps, of C = samples (K+1) in all.
      given_CL: int [C, L], used only at frozen positions.
      frozen_CL: bool [C, L], positions that keep the given token; None: none.

    Returns:
      samples (K+1) 2^K rows, one a step.
    """
    count = 2**max_log2_steps
    jump = jumps.hold(jump, frozen_CL)
    budgets = [grids.make_grid(grid, 2**k) for k in range(max_log2_steps + 1)]

    def repeated(per_budget):  # [2^K, C]: shorter samples over and over
        columns = np.stack([np.resize(values, count) for values in per_budget], axis=1)
        return np.repeat(columns, samples, axis=1)

    t_TC, h_TC = repeated([x[:-1] for x in budgets]), repeated([np.diff(x) for x in budgets])

    def step(z_CL, inputs):
        t_C, h_C, key = inputs
        noise_key, jump_key = jax.random.split(key)
        x0_CL = process.source.sample(noise_key, z_CL.shape)
        z_CL = jnp.where((t_C == 0)[:, None], x0_CL, z_CL)
        if frozen_CL is not None:
            z_CL = jnp.where(frozen_CL, given_CL, z_CL)
        end_CL = jump(jump_key, denoise(z_CL, t_C, h_C), z_CL, t_C, h_C)
        return end_CL, Starts(z_CL, t_C, h_C, frozen_CL)

    empty_CL = jnp.zeros_like(given_CL)
    _, starts = jax.lax.scan(step, empty_CL, (t_TC, h_TC, jax.random.split(key, count)))
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), starts)


def auxiliary_width(t_B: jax.Array, h_B: jax.Array) -> jax.Array:
    """The width that the auxiliary network is conditioned on: one in (h/2, h] that encodes h and t.

    Where all widths are powers of 2, as on a uniform grid, no two steps share one.
    """
    return h_B * jnp.exp2(t_B + h_B - 1.0)


def make(config: ConfigDict, model: ModelConfig, process: Process) -> Stage:
    """The stage; reads `max_log2_steps`, `grid`, `teacher`, `noise` and the auxiliary's keys.

    Raises:
      ValueError: for a mask source, or a value that no run can have.
    """
    if process.source.mask_id is not None:
        raise ValueError(
            "Stage 'refine' needs path.source='uniform'; a mask source has only one noise, and "
            "nothing for tokens of one step to agree by. Leave 'refine' out of the pipeline."
        )
    if len(config.noise) != 2 or config.noise[0] > config.noise[1]:
        raise ValueError(f"refine.noise must be two numbers, low <= high, got {config.noise}.")
    low, high = config.noise
    budgets, grid = config.max_log2_steps, config.grid
    count_samples(config.batch_size // config.accumulate, budgets)
    base_model = dataclasses.replace(model, conditioning="none")
    jump = process.make_jump(jumps.MIXTURE)
    predict = lambda params, *inputs, **given: model_lib.predict(params, model, *inputs, **given)

    def starts(key, given_key, student, batch) -> Starts:
        samples = count_samples(len(batch["x1"]), budgets)
        given_CL = batch["x1"][: samples * (budgets + 1)]
        frozen_CL = draw_frozen(given_key, model, given_CL)
        begun = walk(
            key,
            functools.partial(predict, student, frozen_BL=frozen_CL),
            jump,
            process,
            max_log2_steps=budgets,
            grid=grid,
            samples=samples,
            given_CL=given_CL,
            frozen_CL=frozen_CL,
        )
        return jax.tree.map(lambda x: rules.constrain(x, "rows"), jax.lax.stop_gradient(begun))

    def ends(key, answers, begun: Starts) -> Ends:
        jump_key, share_key, noise_key, path_key = jax.random.split(key, 4)
        held = jumps.hold(jump, begun.frozen_BL)
        end_BL = held(jump_key, answers, begun.z_BL, begun.t_B, begun.h_B)
        share_B = schedules.redraw_fraction(process.schedule, begun.t_B, begun.h_B)
        end_B = process.schedule.kappa(jnp.minimum(begun.t_B + begun.h_B, 1.0))
        again_B = jax.random.uniform(share_key, share_B.shape, minval=low, maxval=high)
        noise_BL = process.source.sample(noise_key, end_BL.shape)
        # Of z' as of x1 on a straight path: shown with probability r.
        zs_BL = paths.sample_path(
            path_key, schedules.Polynomial(), noise_BL, end_BL, again_B, begun.frozen_BL
        )
        return Ends(zs_BL, share_B, end_B, again_B, again_B * end_B)

    def auxiliary_answers(params, begun: Starts, ended: Ends):
        s_B = process.schedule.inverse(ended.kept_B)
        width_B = auxiliary_width(begun.t_B, begun.h_B)
        return predict(params, ended.zs_BL, s_B, width_B, begun.frozen_BL)

    def loss(params, frozen: Frozen, key, batch):
        walk_key, step_key, given_key = jax.random.split(key, 3)
        begun = starts(walk_key, given_key, params, batch)
        answers = predict(params, *begun)
        ended = ends(step_key, jax.lax.stop_gradient(answers), begun)
        own = auxiliary_answers(frozen.partner, begun, ended)
        s_B = process.schedule.inverse(ended.kept_B)
        inputs = (ended.zs_BL, s_B, None, begun.frozen_BL)
        base = model_lib.predict(frozen.needed["teacher"], base_model, *inputs)
        kept_BL = _spread(ended.kept_B, ended.zs_BL)
        others = (own, base, ended.zs_BL, kept_BL)
        value = mean_loss(matching.student_loss, answers, *others, frozen_BL=begun.frozen_BL)
        return value, {"loss": value}

    def learn_law(params, frozen: Frozen, key, batch):
        walk_key, step_key, given_key = jax.random.split(key, 3)
        begun = starts(walk_key, given_key, frozen.partner, batch)
        answers = predict(frozen.partner, *begun)
        ended = ends(step_key, answers, begun)
        numbers = (_spread(x, begun.z_BL) for x in (ended.share_B, ended.end_B, ended.again_B))
        value = mean_loss(
            matching.auxiliary_loss,
            auxiliary_answers(params, begun, ended),
            answers,
            begun.z_BL,
            ended.zs_BL,
            *numbers,
            frozen_BL=begun.frozen_BL,
        )
        return value, {"loss": value}

    return Stage(
        "refine",
        model,
        start_from_base("refine", model),
        loss,
        needs={"teacher": config.teacher},
        auxiliary=Auxiliary(learn_law, config.auxiliary_updates, config.auxiliary_rate),
    )


def _spread(numbers_B: jax.Array, tokens_BL: jax.Array) -> jax.Array:
    """One number a row as one a token."""
    return jnp.broadcast_to(numbers_B[:, None], tokens_BL.shape)

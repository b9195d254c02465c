"""The loss of the few-step stages: path loss for fine steps, distillation for coarse ones.

    loss = E_h [ 1{h < tau} path(h) + 1{h >= tau} distillation(h) ]          eq. 4.5

path(h) is the path loss of eq. 4.4, or the cross-entropy at all positions, which has the same
minimiser (see fsdfm_jax/stages/pretrain.py).

The two parts are strata of the batch with fixed numbers of rows, weighted by their exact
probabilities. This is unbiased, has lower variance than drawing the part of each row, and wastes no
network call.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from fsdfm_jax.flow import jumps, losses, paths, schedules, teacher
from fsdfm_jax.flow.budgets import Budgets, make_budgets, sample_budgets
from fsdfm_jax.flow.jumps import Jump
from fsdfm_jax.flow.losses import Divergence
from fsdfm_jax.flow.process import Process
from fsdfm_jax.flow.teacher import Quadrature
from fsdfm_jax.network import model as model_lib
from fsdfm_jax.network.config import ModelConfig
from fsdfm_jax.ops import logits as logits_lib
from fsdfm_jax.ops.logits import Logits
from fsdfm_jax.parallel import rules
from fsdfm_jax.stages.base import Frozen, draw_frozen, mean_loss


class PathTerm(NamedTuple):
    """The part trained on data: budgets, loss, and rate of the path loss.

    With `guidance` > 0 its target is the posterior of `guided` instead.
    """

    budgets: Budgets
    loss: str
    rate: str
    rate_floor: float
    guidance: float = 0.0


class TeacherTerm(NamedTuple):
    """The part trained on the shortcut teacher: budgets, quadrature, jump and divergence."""

    budgets: Budgets
    rule: Quadrature
    jump: Jump
    divergence: Divergence
    temperature: float


def read_budgets(config: ConfigDict) -> Budgets:
    """Return the step budgets of a stage's config."""
    return make_budgets(
        max_log2_steps=config.max_log2_steps,
        weights=config.width_weights,
        time_eps=config.time_eps,
    )


def read_path_term(config: ConfigDict, budgets: Budgets) -> PathTerm:
    """Return the path term of a config on (a part of) its budgets."""
    return PathTerm(budgets, config.loss, config.rate, config.rate_floor)


def guided(strong_BLV: jax.Array, weak_BLV: jax.Array, *, guidance: float) -> jax.Array:
    """Autoguidance (arXiv:2406.02507): logits [B, L, V] extrapolated away from a weaker model.

        log p = strong + w (strong - weak) + const

    in log-probabilities. The weaker model makes the same errors, but larger, so samples improve at
    equal entropy. A student distilled from this posterior needs no extra network call at sampling
    time (guidance distillation, arXiv:2210.03142).

    Args:
      strong_BLV, weak_BLV: logits, float [B, L, V].
      guidance: w; 0 disables it.
    """
    strong_BLV = jax.nn.log_softmax(strong_BLV, axis=-1)
    push_BLV = strong_BLV - jax.nn.log_softmax(weak_BLV, axis=-1)
    return strong_BLV + guidance * push_BLV


def split_budgets(config: ConfigDict, name: str) -> tuple[Budgets, Budgets]:
    """Split the budgets into those trained on data (h < tau) and on the teacher (eq. 4.5).

    Raises:
      ValueError: if no width is trained on data, which would leave the teacher without a target.
    """
    budgets = read_budgets(config)
    below, above = budgets.split(config.tau)
    if not below.log2_steps:
        raise ValueError(
            f"{name}.tau={config.tau} leaves no step width for training on data; the finest, "
            f"2^-{budgets.finest} = {2.0**-budgets.finest}, must be below tau."
        )
    return below, above


def read_teacher_term(config: ConfigDict, budgets: Budgets, process: Process) -> TeacherTerm:
    """Return the teacher term of a config on its budgets; ValueError for unknown values."""
    rule = jumps.get_rule(config.teacher_jump)
    if config.teacher_end == "posterior_draw":
        rule = jumps.with_posterior_end(rule)
    elif config.teacher_end != "literal":
        raise ValueError(
            f"Unknown teacher_end {config.teacher_end!r}; expected 'posterior_draw' or 'literal'."
        )
    if not config.temperature > 0:
        raise ValueError(f"The distillation temperature must be > 0, got {config.temperature}.")
    return TeacherTerm(
        budgets,
        teacher.get_rule(config.teacher_rule),
        process.make_jump(rule),
        losses.get_divergence(config.divergence),
        config.temperature,
    )


def rows_of_path(batch_size: int, path: Budgets, taught: Budgets) -> int:
    """Number of rows with the path loss: proportional to its share, at least one per part.

    Raises:
      ValueError: if the batch has fewer rows than parts.
    """
    parts = bool(path.log2_steps) + bool(taught.log2_steps)
    if batch_size < parts:
        raise ValueError(
            f"A batch of {batch_size} row(s) is too small for {parts} parts of the loss; raise the "
            "stage's batch_size or lower its accumulate."
        )
    if parts == 2:
        return min(max(round(batch_size * path.share), 1), batch_size - 1)
    return batch_size if path.log2_steps else 0


def make_loss(
    model: ModelConfig, process: Process, path: PathTerm, taught: TeacherTerm | None
) -> Callable[..., tuple[jax.Array, dict[str, jax.Array]]]:
    """Make the combined loss, a `Stage.loss`; without `taught`, all rows are trained on data.

    Metrics: `loss`, and the unweighted mean of each part, `path_loss` (`guidance_loss` with
      guidance) and `distillation_loss`.
    """
    no_budgets = path.budgets._replace(log2_steps=(), probabilities=())
    taught_budgets = taught.budgets if taught else no_budgets
    data_loss = _guidance_loss if path.guidance else _data_loss
    data_name = "guidance_loss" if path.guidance else "path_loss"

    def loss(params, frozen: Frozen, key, batch):
        keys = jax.random.split(key, 6)
        noise_key, budget_key, path_key, dropout_key, teacher_key, given_key = keys
        x1_BL = batch["x1"]
        x0_BL = process.source.sample(noise_key, x1_BL.shape)
        size = len(x1_BL)
        split = rows_of_path(size, path.budgets, taught_budgets)
        parts = [(path.budgets, split), (taught_budgets, size - split)]
        t_B, h_B = _draw_budgets(budget_key, parts)
        frozen_BL = draw_frozen(given_key, model, x1_BL)
        xt_BL = paths.sample_path(path_key, process.schedule, x0_BL, x1_BL, t_B, frozen_BL)
        student = model_lib.predict(params, model, xt_BL, t_B, h_B, frozen_BL, key=dropout_key)
        rows = _Rows(student, x1_BL, xt_BL, t_B, h_B, frozen_BL)

        value, metrics = jnp.zeros(()), {}
        if split:
            part = data_loss(model, process, path, frozen, rows.take(0, split))
            value += path.budgets.share * part
            metrics[data_name] = part
        if taught is not None and split < size:
            part = _teacher_loss(model, taught, frozen, teacher_key, rows.take(split, size))
            value += taught.budgets.share * part
            metrics["distillation_loss"] = part
        return value, metrics | {"loss": value}

    return loss


class _Rows(NamedTuple):
    """Rows of a batch, with the student's logits."""

    student: Logits
    x1_BL: jax.Array
    xt_BL: jax.Array
    t_B: jax.Array
    h_B: jax.Array
    frozen_BL: jax.Array | None

    def take(self, begin: int, end: int) -> "_Rows":
        arrays = jax.tree.map(lambda array: array[begin:end], self[1:])
        return _Rows(logits_lib.rows(self.student, begin, end), *arrays)


def _draw_budgets(key, parts: Sequence[tuple[Budgets, int]]) -> tuple[jax.Array, jax.Array]:
    """Draw times and widths of all rows, float32 [B] each, from the budgets of each part."""
    drawn = [
        sample_budgets(jax.random.fold_in(key, i), budgets, rows)
        for i, (budgets, rows) in enumerate(parts)
        if rows
    ]
    t_B, h_B = (jnp.concatenate(part) for part in zip(*drawn, strict=True))
    return t_B, h_B


def _mean(loss, rows: _Rows, *targets) -> jax.Array:
    """Mean of loss(student, *targets) over the rows; `targets` are padded by `rules.pad_rows`."""
    student = logits_lib.pad_rows(rows.student)
    frozen_BL = jax.tree.map(rules.pad_rows, rows.frozen_BL)  # None stays None
    return mean_loss(loss, student, *targets, frozen_BL=frozen_BL, num_rows=len(rows.t_B))


def _data_loss(model, process: Process, path: PathTerm, frozen: Frozen, rows: _Rows) -> jax.Array:
    """Eq. 4.4, or the cross-entropy, which has the same minimiser."""
    del model, frozen
    if path.loss == "cross_entropy":
        return _mean(losses.cross_entropy, rows, rules.pad_rows(rows.x1_BL))
    if path.rate == "instantaneous":
        weight_B = schedules.rate(process.schedule, rows.t_B, floor=path.rate_floor)
    else:
        weight_B = schedules.bounded_cumulative_rate(
            process.schedule, rows.t_B, rows.h_B, floor=path.rate_floor
        )
    weight_BL = jnp.broadcast_to(weight_B[:, None], rows.xt_BL.shape)
    targets = map(rules.pad_rows, (rows.xt_BL, rows.x1_BL, weight_BL))
    return _mean(losses.path_loss, rows, *targets)


def _guidance_loss(
    model: ModelConfig, process: Process, path: PathTerm, frozen: Frozen, rows: _Rows
) -> jax.Array:
    """Forward KL to the posterior of `guided`."""
    del process
    if not frozen.needed:
        raise ValueError("Guidance needs the weights of two base models in Frozen.needed.")

    def loss(student_BLV, strong_BLV, weak_BLV):
        target_BLV = guided(strong_BLV, weak_BLV, guidance=path.guidance)
        return losses.distillation_loss(losses.forward_kl, target_BLV, student_BLV)

    base_model = dataclasses.replace(model, conditioning="none")
    inputs = jax.tree.map(rules.pad_rows, (rows.xt_BL, rows.t_B, None, rows.frozen_BL))
    strong, weak = (
        model_lib.predict(frozen.needed[key], base_model, *inputs) for key in ("init_from", "guide")
    )
    return _mean(loss, rows, strong, weak)


def _teacher_loss(
    model: ModelConfig, taught: TeacherTerm, frozen: Frozen, key: jax.Array, rows: _Rows
) -> jax.Array:
    """Divergence from the shortcut teacher, Algorithm 1."""

    def loss(student_BLV, teacher_BLV):
        return losses.distillation_loss(
            taught.divergence, teacher_BLV, student_BLV, temperature=taught.temperature
        )

    # A row's noise doesn't depend on the number of rows, so padding is harmless.
    *inputs, frozen_BL = jax.tree.map(
        rules.pad_rows, (rows.xt_BL, rows.t_B, rows.h_B, rows.frozen_BL)
    )
    denoise = functools.partial(model_lib.predict, frozen.average, model, frozen_BL=frozen_BL)
    jump = jumps.hold(taught.jump, frozen_BL)
    target = teacher.teacher_logits(key, taught.rule, denoise, jump, *inputs)
    return _mean(loss, rows, target)

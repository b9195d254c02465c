"""The loss that the few-step stages share: path loss on fine steps, distillation on coarse.

    loss = E_h [ 1{h < tau} path(h) + 1{h >= tau} distillation(h) ]          eq. 4.5

On data, path(h) is the path loss of eq. 4.4, or the cross-entropy at all positions, which has the
same minimiser (see fsdfm_jax/stages/pretrain.py).

With guidance w > 0 the fine steps learn another posterior than that of the text: the base model's,
pushed away from that of a weaker one, which was trained for a fraction of the steps (autoguidance,
arXiv:2406.02507),

    log p = strong + w (strong - weak) + const

of log-probabilities, which the wide steps then take over from the fine ones. What both make
mistakes in, the weak one does more of; so that samples become better at the same entropy. The
student learns the sum (guidance distillation, arXiv:2210.03142) and needs no further network call
when it samples.

The two parts are strata of the batch with a fixed number of rows each, weighted by their exact
probabilities: unbiased, of lower variance than drawing each row's part, and no row pays for a
network call whose result it wouldn't use.
"""

import dataclasses
import math
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
from fsdfm_jax.parallel import rules
from fsdfm_jax.stages.base import Guide

LOSSES = ("path", "cross_entropy")
RATES = ("cumulative", "instantaneous")


class PathTerm(NamedTuple):
    """The part trained on data: its budgets, its loss, and the weight of the path loss.

    `guidance` is w of the module's text; above 0 the loss is the divergence from that posterior.
    """

    budgets: Budgets
    loss: str
    rate: str
    rate_floor: float
    guidance: float = 0.0


class TeacherTerm(NamedTuple):
    """The part trained on the shortcut teacher: its budgets, how it moves and is compared."""

    budgets: Budgets
    rule: Quadrature
    jump: Jump
    divergence: Divergence
    temperature: float


def read_budgets(config: ConfigDict) -> Budgets:
    """The step budgets of a stage's config."""
    return make_budgets(
        max_log2_steps=config.max_log2_steps,
        weights=config.width_weights,
        time_eps=config.time_eps,
    )


def read_path_term(config: ConfigDict, budgets: Budgets) -> PathTerm:
    """The path term of a config on (a part of) its budgets; ValueError for unknown values."""
    for name, allowed in (("loss", LOSSES), ("rate", RATES)):
        if config[name] not in allowed:
            raise ValueError(
                f"Unknown {name} {config[name]!r}; expected one of {', '.join(allowed)}."
            )
    if not 0 <= config.guidance < math.inf:
        raise ValueError(f"guidance must be 0 or more and finite, got {config.guidance}.")
    if (config.guidance > 0) != (config.guide_steps > 0):
        raise ValueError(
            f"guidance={config.guidance} and guide_steps={config.guide_steps} go together: how "
            "much to be pushed away, and from a base model of how many steps; 0 and 0 for none."
        )
    return PathTerm(
        budgets,
        config.loss,
        config.rate,
        check_rate_floor(config.rate_floor),
        config.guidance,
    )


def guided(strong_BLV: jax.Array, weak_BLV: jax.Array, *, guidance: float) -> jax.Array:
    """The guided posterior of the module's text, as logits.

    Args:
      strong_BLV, weak_BLV: logits, float [B, L, V].
      guidance: w.
    """
    strong_BLV = jax.nn.log_softmax(strong_BLV, axis=-1)
    push_BLV = strong_BLV - jax.nn.log_softmax(weak_BLV, axis=-1)
    return strong_BLV + guidance * push_BLV


def check_rate_floor(floor: float) -> float:
    """The floor of 1 - kappa in a loss weight; ValueError unless in (0, 1)."""
    if not 0 < floor < 1:
        raise ValueError(f"rate_floor must lie in (0, 1), got {floor}.")
    return floor


def split_budgets(config: ConfigDict, name: str) -> tuple[Budgets, Budgets]:
    """The budgets trained on data (h < tau) and those trained on the teacher (eq. 4.5).

    Raises:
      ValueError: if no width is trained on data: nothing would tie the teacher to the text.
    """
    budgets = read_budgets(config)
    below, above = budgets.split(config.tau)
    if not below.log2_steps:
        raise ValueError(
            f"{name}.tau={config.tau} leaves no step width to be trained on data; the finest is "
            f"2^-{budgets.finest} = {2.0**-budgets.finest} and must be below tau."
        )
    return below, above


def read_teacher_term(config: ConfigDict, budgets: Budgets, process: Process) -> TeacherTerm:
    """The teacher term of a config on (a part of) its budgets; ValueError for unknown values."""
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
    """Rows of a batch that get the path loss: in proportion, at least one a part.

    Raises:
      ValueError: if the batch has fewer rows than parts.
    """
    parts = bool(path.log2_steps) + bool(taught.log2_steps)
    if batch_size < parts:
        raise ValueError(f"A batch of {batch_size} row(s) can't hold {parts} parts of the loss.")
    if parts == 2:
        return min(max(round(batch_size * path.share), 1), batch_size - 1)
    return batch_size if path.log2_steps else 0


def make_loss(model: ModelConfig, process: Process, path: PathTerm, taught: TeacherTerm | None):
    """The blended loss as a `Stage.loss`; without `taught`, all rows are trained on data.

    Metrics: `loss`, and the mean of each part, `path_loss` (with guidance `guidance_loss`) and
      `distillation_loss` (before weighting).
    """

    def match(student_BLV, teacher_BLV):
        return losses.distillation_loss(
            taught.divergence, teacher_BLV, student_BLV, temperature=taught.temperature
        )

    def follow(student_BLV, strong_BLV, weak_BLV):
        target_BLV = guided(strong_BLV, weak_BLV, guidance=path.guidance)
        return losses.distillation_loss(losses.forward_kl, target_BLV, student_BLV)

    base_model = dataclasses.replace(model, conditioning="none")
    no_budgets = path.budgets._replace(log2_steps=(), probabilities=())
    taught_budgets = taught.budgets if taught else no_budgets

    def loss(params, frozen, key, batch, guide: Guide | None = None):
        keys = jax.random.split(key, 5)
        x1_BL = batch["x1"]
        batch_size = x1_BL.shape[0]
        x0_BL = batch["x0"] if "x0" in batch else process.source.sample(keys[0], x1_BL.shape)

        split = rows_of_path(batch_size, path.budgets, taught_budgets)
        parts = [(path.budgets, split), (taught_budgets, batch_size - split)]
        budgets_key = keys[1]
        drawn = [
            sample_budgets(jax.random.fold_in(budgets_key, i), budgets, rows)
            for i, (budgets, rows) in enumerate(parts)
            if rows
        ]
        t_B = jnp.concatenate([t for t, _ in drawn])
        h_B = jnp.concatenate([h for _, h in drawn])
        xt_BL = paths.sample_path(keys[2], process.schedule, x0_BL, x1_BL, t_B)
        logits = model_lib.predict(params, model, xt_BL, t_B, h_B, key=keys[3])

        value, metrics = jnp.zeros(()), {}
        if split:
            x_RL, x1_RL, t_R = xt_BL[:split], x1_BL[:split], t_B[:split]
            name = "path_loss"
            if path.guidance:
                name, data_loss = "guidance_loss", follow
                inputs = [rules.pad_rows(x) for x in (x_RL, t_R)]
                targets = [model_lib.predict(weights, base_model, *inputs) for weights in guide]
            elif path.loss == "path":
                weight_R = _path_weight(path, process, t_R, h_B[:split])
                weight_RL = jnp.broadcast_to(weight_R[:, None], x_RL.shape)
                data_loss = losses.path_loss
                targets = [rules.pad_rows(x) for x in (x_RL, x1_RL, weight_RL)]
            else:
                data_loss, targets = losses.cross_entropy, [rules.pad_rows(x1_RL)]
            student = logits_lib.pad_rows(logits_lib.rows(logits, 0, split))
            part = logits_lib.mean_loss(data_loss, student, *targets, num_rows=split)
            value += path.budgets.share * part
            metrics[name] = part
        if split < batch_size:

            def denoise(x, t, h):
                return model_lib.predict(frozen, model, x, t, h)

            # The noise of a row doesn't depend on how many there are: padding changes nothing.
            inputs = (rules.pad_rows(x[split:]) for x in (xt_BL, t_B, h_B))
            target = teacher.teacher_logits(keys[4], taught.rule, denoise, taught.jump, *inputs)
            student = logits_lib.pad_rows(logits_lib.rows(logits, split, batch_size))
            part = logits_lib.mean_loss(match, student, target, num_rows=batch_size - split)
            value += taught.budgets.share * part
            metrics["distillation_loss"] = part
        return value, metrics | {"loss": value}

    return loss


def _path_weight(path: PathTerm, process: Process, t_B, h_B):
    if path.rate == "instantaneous":
        return schedules.rate(process.schedule, t_B, floor=path.rate_floor)
    return schedules.bounded_cumulative_rate(process.schedule, t_B, h_B, floor=path.rate_floor)

"""The method as one writes it down first: the reference row of the speed benchmarks.

Every row of a batch gets both losses and drops one; every evaluation of the teacher writes its
logits down, and so does the target; jumps hold rates and draws of size [B, L, V].
"""

import jax
import jax.numpy as jnp

from fsdfm_jax.flow import losses, paths, schedules, teacher
from fsdfm_jax.flow.budgets import sample_budgets
from fsdfm_jax.flow.process import Process
from fsdfm_jax.network import model as model_lib
from fsdfm_jax.network.config import ModelConfig
from fsdfm_jax.ops import logits as logits_lib
from fsdfm_jax.stages.few_step import PathTerm, TeacherTerm


def make_jump(schedule: schedules.Schedule):
    """The cumulative rule with all rates and all Gumbel numbers written down."""

    def jump(key, logits_BLV, xt_BL, t_B, h_B):
        move_key, token_key = jax.random.split(key)
        t_B1, h_B1 = t_B[:, None], h_B[:, None]
        p_BLV = jax.nn.softmax(logits_BLV, axis=-1)
        is_current_BLV = jax.nn.one_hot(xt_BL, p_BLV.shape[-1])
        rate_B1 = schedules.log_survival(schedule, t_B1, h_B1) / h_B1
        rates_BLV = rate_B1[..., None] * p_BLV * (1.0 - is_current_BLV)
        total_BL = jnp.sum(rates_BLV, axis=-1)
        moves_BL = jax.random.uniform(move_key, xt_BL.shape) < 1.0 - jnp.exp(-h_B1 * total_BL)
        drawn_BL = jax.random.categorical(token_key, jnp.log(rates_BLV))
        return jnp.where(moves_BL, drawn_BL.astype(xt_BL.dtype), xt_BL)

    return jump


def finalize(key, logits_BLV, xt_BL):
    """The last step of the sampler with a Gumbel number for every entry of the logits."""
    return jax.random.categorical(key, logits_BLV).astype(xt_BL.dtype)


def teacher_logits(key, rule, denoise, jump, xt_BL, t_B, h_B):
    """The shortcut teacher's average of logits, each evaluation written down."""
    half_B, state_BL, mean_BLV = h_B / 2, xt_BL, 0.0
    keys = jax.random.split(key, len(rule.nodes))
    for i, (node, weight) in enumerate(zip(rule.nodes, rule.weights, strict=True)):
        time_B = jnp.minimum(t_B + node * h_B, 1.0)
        logits_BLV = denoise(state_BL, time_B, half_B)
        mean_BLV += weight * logits_BLV
        if i < len(rule.nodes) - 1:
            state_BL = jump(keys[i], logits_BLV, state_BL, time_B, half_B)
    return jax.lax.stop_gradient(mean_BLV)


def make_loss(
    model: ModelConfig,
    process: Process,
    path: PathTerm,
    taught: TeacherTerm,
    *,
    split: bool = False,
    average: str = "literal",
):
    """The loss of the distillation stage (eq. 4.5), half of the rows below tau.

    Args:
      model, process, path, taught: as `few_step.make_loss` takes them.
      split: each row gets its own loss only, as in the library; else both, one of them dropped.
      average: "literal"; "logits", the library's teacher on logits that are written down; or
        "features", the library's.
    """

    def loss(params, frozen, key, batch):
        keys = jax.random.split(key, 6)
        x1_BL = batch["x1"]
        rows, length = x1_BL.shape
        fine = rows // 2
        drawn = [
            sample_budgets(keys[0], path.budgets, fine),
            sample_budgets(keys[1], taught.budgets, rows - fine),
        ]
        t_B, h_B = (jnp.concatenate(parts) for parts in zip(*drawn, strict=True))
        x0_BL = process.source.sample(keys[2], x1_BL.shape)
        xt_BL = paths.sample_path(keys[3], process.schedule, x0_BL, x1_BL, t_B)
        logits = model_lib.predict(params, model, xt_BL, t_B, h_B, key=keys[4])

        def denoise(x, t, h):
            logits = model_lib.predict(frozen.average, model, x, t, h)
            return logits if average == "features" else logits_lib.dense(logits)

        def match(student_BLV, teacher_BLV, counts_BL):
            return counts_BL * losses.distillation_loss(
                taught.divergence, teacher_BLV, student_BLV, temperature=taught.temperature
            )

        is_fine_B = jnp.arange(rows) < fine
        weight_B = schedules.bounded_cumulative_rate(
            process.schedule, t_B, h_B, floor=path.rate_floor
        )
        weight_BL = jnp.tile(jnp.where(is_fine_B, weight_B, 0.0)[:, None], (1, length))
        counts_BL = jnp.tile(jnp.where(is_fine_B, 0.0, 1.0)[:, None], (1, length))

        begin, end = (fine, fine) if split else (0, rows)  # of the teacher, of the data loss
        form = teacher_logits if average == "literal" else teacher.teacher_logits
        jump = make_jump(process.schedule) if average == "literal" else taught.jump
        target = form(keys[5], taught.rule, denoise, jump, xt_BL[begin:], t_B[begin:], h_B[begin:])
        data_part = logits_lib.mean_loss(
            losses.path_loss,
            logits_lib.rows(logits, 0, end),
            xt_BL[:end],
            x1_BL[:end],
            weight_BL[:end],
        )
        taught_part = logits_lib.mean_loss(
            match, logits_lib.rows(logits, begin, rows), target, counts_BL[begin:]
        )
        value = (end * data_part + (rows - begin) * taught_part) / rows
        return value, {"loss": value}

    return loss

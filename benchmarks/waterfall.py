"""Where the time of a distillation step goes, each part against its floor.

    python -m benchmarks.waterfall --size=0.17B --batch=2 --length=1024 --output=waterfall.json

The parts are compiled and timed one by one, in turn with the whole step. The floor of a part is its
matrix products at the measured ceiling or, for the optimiser, the bytes it has to read and write at
the measured bandwidth. "not explained" is what the parts leave. A picture is put beside the JSON.
"""

import functools
import pathlib
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
from absl import app

from benchmarks import measure, train
from fsdfm_jax.flow import jumps, losses, schedules
from fsdfm_jax.network import model as model_lib
from fsdfm_jax.ops import logits as logits_lib
from launch import model_flops

STEP = "whole step"


def bandwidth(*, num_bytes: float = 2e9, repeats: int = 5) -> float:
    """Bytes per second of reading and writing an array in place, the best of some."""
    array = jnp.ones((int(num_bytes / 8),), jnp.float32)
    # Donated, as the training state is: fresh memory would cost more than the traffic.
    scale = jax.jit(lambda x: x * 1.5, donate_argnums=0)
    best = float("inf")
    for _ in range(repeats + 1):
        began = time.perf_counter()
        array = jax.block_until_ready(scale(array))
        best = min(best, time.perf_counter() - began)
    return num_bytes / best


def parts_of(model, params, *, batch: int, length: int) -> dict[str, tuple[Any, int, float]]:
    """Name -> (function to time, times it runs in a step, operations of one run)."""
    key = jax.random.key(0)
    taught, fine = batch - batch // 2, batch // 2
    tokens_BL = jax.random.randint(key, (batch, length), 0, model.vocab_size)
    t_B = jnp.full((batch,), 0.5)
    features = jax.jit(lambda p, x, t: model_lib.predict(p, model, x, t, t).features_BLD)

    def trunk_loss(p, x, t):
        return jnp.sum(jnp.sin(model_lib.predict(p, model, x, t, t, key=key).features_BLD))

    trained = jax.jit(lambda p, x, t: model_lib.predict(p, model, x, t, t, key=key).features_BLD)
    logits = model_lib.predict(params, model, tokens_BL, t_B, t_B)
    jump = jax.jit(
        jumps.make_jump(jumps.CUMULATIVE, schedules.make_schedule("polynomial", power=1))
    )

    def match(student, target):
        return losses.distillation_loss(losses.forward_kl, target, student)

    def graded(loss):
        return jax.jit(lambda z, *args: jax.grad(lambda z: logits_lib.mean_loss(loss, z, *args))(z))

    on_data, on_teacher = graded(losses.path_loss), graded(match)
    fine_logits = logits_lib.rows(logits, 0, fine)
    taught_logits = logits_lib.rows(logits, fine, batch)
    teacher_BL = tokens_BL[:taught]
    weight_BL = jnp.ones((fine, length))
    trunk = functools.partial(model_flops.trunk_flops, model, length=length)
    head = functools.partial(model_flops.head_flops, model, length=length)
    backward = jax.jit(jax.grad(trunk_loss))
    return {
        "teacher: trunk": (
            lambda: features(params, teacher_BL, t_B[:taught]),
            4,
            trunk(batch=taught),
        ),
        "teacher: head and jump": (
            lambda: jump(key, taught_logits, teacher_BL, t_B[:taught], t_B[:taught]),
            3,
            head(batch=taught),
        ),
        "student: trunk forward": (lambda: trained(params, tokens_BL, t_B), 1, trunk(batch=batch)),
        "student: trunk, both ways": (
            lambda: backward(params, tokens_BL, t_B),
            1,
            3 * trunk(batch=batch),
        ),
        "head and data loss": (
            lambda: on_data(fine_logits, tokens_BL[:fine], tokens_BL[:fine], weight_BL),
            1,
            3 * head(batch=fine),
        ),
        "both heads and distillation": (
            lambda: on_teacher(taught_logits, taught_logits),
            1,
            4 * head(batch=taught),
        ),
    }


def table_of(seconds, parts, *, ceiling: float, optimiser_floor: float) -> list[dict[str, Any]]:
    """Rows of the waterfall; the trunk's two ways are shown apart."""
    middle = {name: statistics.median(values) for name, values in seconds.items()}
    spent = {name: count * middle[name] for name, (_, count, _) in parts.items()}
    floors = {name: count * flops / ceiling for name, (_, count, flops) in parts.items()}
    both, forward = "student: trunk, both ways", "student: trunk forward"
    order = []
    for name in parts:
        if name == both:
            order.append(
                (
                    "student: trunk backward",
                    spent[both] - spent[forward],
                    floors[both] - floors[forward],
                )
            )
        else:
            order.append((name, spent[name], floors[name]))
    order.append(("optimiser and average", middle["optimiser and average"], optimiser_floor))
    whole = middle[STEP]
    explained = sum(s for _, s, _ in order)
    order.append(("not explained", whole - explained, 0.0))
    order.append((STEP, whole, sum(f for _, _, f in order)))
    return [
        {
            "part": name,
            "seconds": s,
            "share": s / whole,
            "floor_s": f,
            "of_floor": s / f if f else None,
        }
        for name, s, f in order
    ]


def plot(rows: list[dict[str, Any]], path: pathlib.Path) -> None:
    """The parts as a waterfall, each with its floor."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panel = pyplot.subplots(figsize=(9, 4))
    begin = 0.0
    for i, row in enumerate(rows):
        at = 0.0 if row["part"] == STEP else begin
        panel.barh(i, row["seconds"], left=at, color="#7aa6c2")
        panel.barh(i, row["floor_s"], left=at, color="#1f4e6b", height=0.4)
        begin += row["seconds"]
    panel.set_yticks(range(len(rows)), [row["part"] for row in rows])
    panel.invert_yaxis()
    panel.set_xlabel("seconds; dark: floor")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"Unexpected arguments: {argv[1:]}")
    if measure.LOGITS_MIB.value == 0:
        raise app.UsageError("The parts are those of the fused form; --logits_mib must be above 0.")
    size, batch, length = measure.SIZE.value, measure.BATCH.value or 2, measure.LENGTH.value
    dtype, overrides = measure.DTYPE.value, train.overrides_asked()
    shape = {"size": size, "length": length, "dtype": dtype, "overrides": overrides}
    step, init, model = train.make_case("ours", stage="distill", **shape)
    ceiling, bytes_per_s = measure.matmul_ceiling(dtype), bandwidth()
    key = jax.random.key(0)
    held = {"state": jax.jit(init)(key)}
    params = jax.tree.map(jnp.copy, held["state"].params)
    gradients = jax.tree.map(lambda x: x * 1e-3, params)
    tokens_BL = jax.random.randint(key, (batch, length), 0, model.vocab_size)

    def given(params, frozen, key, batch):
        """A loss whose gradient is the batch."""
        products = jax.tree.map(lambda p, g: jnp.sum(p * g), params, batch)
        return sum(jax.tree.leaves(products)), {}

    update = functools.partial(step, loss=given)
    step, update = jax.jit(step, donate_argnums=0), jax.jit(update, donate_argnums=0)

    def stepping(run, batch):
        held["state"], metrics = run(held["state"], batch, key)
        return held["state"].step, metrics

    parts = parts_of(model, params, batch=batch, length=length)
    cases = {STEP: lambda: stepping(step, {"x1": tokens_BL})}
    cases |= {name: run for name, (run, _, _) in parts.items()}
    cases["optimiser and average"] = lambda: stepping(update, gradients)
    seconds = measure.in_turn(cases, rounds=measure.ROUNDS.value)
    # Reads parameters, average, two moments and gradients, writes all but the last: 9 x 4 bytes.
    optimiser_floor = 36 * model_lib.count_params(params) / bytes_per_s
    rows = table_of(seconds, parts, ceiling=ceiling, optimiser_floor=optimiser_floor)
    print(
        f"distillation step, {size}, batch {batch} x {length}, {dtype}: matmul ceiling "
        f"{ceiling / 1e12:.3g} TFLOP/s, memory at {bytes_per_s / 1e9:.3g} GB/s"
    )
    measure.print_table(rows)
    if measure.OUTPUT.value:
        result = {"machine": measure.machine(), "ceiling": ceiling, "bandwidth": bytes_per_s}
        measure.write(result | {"shape": shape, "batch": batch, "parts": rows})
        plot(rows, pathlib.Path(measure.OUTPUT.value).expanduser().with_suffix(".png"))


if __name__ == "__main__":
    app.run(main)

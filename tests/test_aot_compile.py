"""Compiling ahead: what is read out of a compiled program, and the program that prints it."""

import functools
import json
import os
import pathlib
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from configs import base, tiny
from fsdfm_jax import stages
from fsdfm_jax.flow import process as process_lib
from fsdfm_jax.parallel import mesh as mesh_lib
from fsdfm_jax.stages import few_step
from launch import ahead, hlo_cost, model_flops, roofline
from launch.hlo_cost import Cost, Exchange, Kernel

ROOT = pathlib.Path(__file__).parents[1]


def compiled_cost(fn, *arguments):
    compiled = jax.jit(fn).lower(*arguments).compile()
    return hlo_cost.measure(compiled.as_text()), compiled


# ------------------------------------------------------------------------------------------- loops


def nested(w_OIDD, x_BD, *, unroll):
    """O x I products of [B, D] with [D, D]."""

    def outer(x_BD, w_IDD):
        step = lambda x, w: (jnp.tanh(x @ w), None)
        return jax.lax.scan(step, x_BD, w_IDD, unroll=unroll)[0], jnp.sum(x_BD)

    return jax.lax.scan(outer, x_BD, w_OIDD, unroll=unroll)


def test_loops_count_as_often_as_they_run():
    shapes = jnp.zeros((5, 3, 64, 64)), jnp.zeros((32, 64))
    looped, program = compiled_cost(functools.partial(nested, unroll=1), *shapes)
    assert looped.unknown_loops == []
    assert looped.flops == 5 * 3 * 2 * 32 * 64 * 64
    # The compiler's own count is that of one round, or nearly so: else there'd be no need of ours.
    assert program.cost_analysis()["flops"] < looped.flops / 5
    flat, program = compiled_cost(functools.partial(nested, unroll=True), *shapes)
    assert flat.flops == looped.flops
    assert program.cost_analysis()["flops"] == pytest.approx(flat.flops, rel=0.02)
    # A round's matrix is cut out of the stack twice and read; x is written and read by two kernels.
    # Were a loop to read the whole stack each time, it would be 15 matrices more.
    matrix, x = 4 * 64 * 64, 4 * 32 * 64
    assert looped.hbm_bytes == pytest.approx(15 * (5 * matrix + 4 * x), rel=0.15)


LOOP = """HloModule toy, is_scheduled=true, num_partitions=4

%body (state: (s32[], f32[8,8])) -> (s32[], f32[8,8]) {
  %state = (s32[]{:T(128)}, f32[8,8]{1,0:T(8,128)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%state), index=0
  %step = s32[]{:T(128)} constant(2)
  %next = s32[]{:T(128)} add(%i, %step)
  %x = f32[8,8]{1,0:T(8,128)} get-tuple-element(%state), index=1
  %y = f32[8,8]{1,0:T(8,128)} dot(%x, %x), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  ROOT %both = (s32[]{:T(128)}, f32[8,8]{1,0:T(8,128)}) tuple(%next, %y)
}

%condition (state.1: (s32[], f32[8,8])) -> pred[] {
  %limit = s32[]{:T(128)} constant(12)
  %state.1 = (s32[]{:T(128)}, f32[8,8]{1,0:T(8,128)}) parameter(0)
  %i.1 = s32[]{:T(128)} get-tuple-element(%state.1), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i.1, %limit), direction=LT
}

ENTRY %main (x.0: f32[8,8]) -> f32[8,8] {
  %x.0 = f32[8,8]{1,0:T(8,128)} parameter(0)
  %first = s32[]{:T(128)} constant(3)
  %start = (s32[]{:T(128)}, f32[8,8]{1,0:T(8,128)}) tuple(%first, %x.0)
  %loop = (s32[]{:T(128)}, f32[8,8]{1,0:T(8,128)}) while(%start), condition=%condition, body=%body
  ROOT %out = f32[8,8]{1,0:T(8,128)} get-tuple-element(%loop), index=1
}
"""


@pytest.mark.parametrize(
    ("change", "rounds"),
    [
        (("", ""), 5),  # 3, 5, 7, 9, 11
        (("direction=LT", "direction=LE"), 5),
        (("constant(12)", "constant(13)"), 5),
        (("constant(3)", "constant(0)"), 6),
        (
            (
                "compare(%i.1, %limit), direction=LT",
                "compare(%limit, %i.1), direction=GT",
            ),
            5,
        ),
        (
            ("body=%body", 'body=%body, backend_config={"known_trip_count":{"n":"7"}}'),
            7,
        ),
    ],
)
def test_rounds_of_a_loop_follow_from_its_counter(change, rounds):
    cost = hlo_cost.measure(LOOP.replace(*change))
    assert cost.unknown_loops == []
    assert cost.flops == rounds * 2 * 8**3


def test_loops_of_unknown_length_are_named():
    cost = hlo_cost.measure(LOOP.replace("constant(12)", "negate(%i.1)"))
    assert cost.unknown_loops == ["loop"]
    assert cost.flops == 2 * 8**3
    loop = lambda x, n: jax.lax.while_loop(
        lambda s: s[0] < n, lambda s: (s[0] + 1, s[1] @ x), (0, x)
    )
    assert len(compiled_cost(loop, jnp.zeros((8, 8)), 3)[0].unknown_loops) == 1


def test_another_text_is_refused():
    with pytest.raises(ValueError, match="no entry computation"):
        hlo_cost.measure("module @jit_f { }")


# -------------------------------------------------------------------------------------- operations


def test_products_that_tpus_write_as_convolutions():
    # [2, 12, 1024, 64] x [2, 12, 64, 1024], batch and heads as windows that meet one place each.
    text = """HloModule toy

ENTRY %main (a: bf16[2,12,1024,64], b: bf16[2,12,1024,64]) -> f32[2,12,1024,1024] {
  %a = bf16[2,12,1024,64]{3,2,1,0} parameter(0)
  %b = bf16[2,12,1024,64]{3,2,1,0} parameter(1)
  ROOT %c = f32[2,12,1024,1024]{3,2,1,0} convolution(%a, %b), window={SIZES}, dim_labels=LABELS
}
""".replace("SIZES", "size=2x12 stride=1x11 lhs_dilate=2x12").replace("LABELS", "01bf_01oi->01bf")
    assert hlo_cost.measure(text).flops == 2 * 2 * 12 * 1024 * 1024 * 64


def test_convolutions_count_as_the_compiler_does():
    shapes = jnp.zeros((2, 14, 9, 8)), jnp.zeros((5, 3, 8, 6))

    def convolve(x, w):
        return jax.lax.conv_general_dilated(
            x,
            w,
            (2, 1),
            ((2, 1), (1, 1)),
            lhs_dilation=(1, 2),
            rhs_dilation=(2, 1),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )

    cost, compiled = compiled_cost(convolve, *shapes)
    assert cost.flops > 0
    assert cost.flops == compiled.cost_analysis()["flops"]


def gradient_cost(num_blocks):
    """(cost, compiled, analytic operations) of the gradient of a small pre-training loss."""
    config = tiny.get_config()
    config.model.width, config.model.num_blocks, config.model.cond_width = 128, num_blocks, 16
    config.model.attention, config.model.remat, config.model.logits_mib = "manual", "none", 0
    config.data.block_length, config.data.vocab_size = 128, 512
    process = ahead.make_process(config)
    stage = stages.make_stage("pretrain", config, process)
    params = jax.eval_shape(lambda key: stage.init_params(key, None), jax.random.key(0))
    batch = {"x1": jax.ShapeDtypeStruct((4, 128), jnp.int32)}

    def gradient(params, key, batch):
        return jax.grad(stage.loss, has_aux=True)(params, None, key, batch)

    found = compiled_cost(gradient, params, jax.eval_shape(lambda: jax.random.key(0)), batch)
    return *found, model_flops.step_flops("pretrain", config, stage.model, 4)


def test_operations_are_the_compilers_without_a_loop_and_the_formulas_with_one():
    cost, compiled, useful = gradient_cost(num_blocks=1)
    # The compiler counts norms, softmax and GELU as well.
    assert cost.flops <= compiled.cost_analysis()["flops"] <= 1.1 * cost.flops
    assert cost.flops == pytest.approx(useful, rel=0.02)
    cost, compiled, useful = gradient_cost(num_blocks=3)
    assert compiled.cost_analysis()["flops"] < 0.6 * cost.flops
    assert cost.flops == pytest.approx(useful, rel=0.02)


def test_useful_operations_count_student_and_teacher():
    config = base.get_config()
    base.use_paper_values(config, "0.17B")
    base.use_paper_recipe(config)
    process = process_lib.make_process(**config.path, num_tokens=50_257, eos_id=0)
    model = stages.make_stage("distill", config, process).model
    forward = model_flops.forward_flops(model, 1, 1024)
    dense = 12 * (4 + 8) * 768**2 + 768 * 50_257
    assert forward == 2 * 1024 * (dense + 2 * 12 * 1024 * 768)
    assert model_flops.step_flops("pretrain", config, model, 96) == 3 * 96 * forward
    config.distill.tau = 2.0**-7  # fewer rows for the teacher than for the data
    taught = 96 - round(96 * few_step.split_budgets(config.distill, "distill")[0].share)
    assert 0 < taught < 48
    assert model_flops.step_flops("distill", config, model, 96) == (3 * 96 + 4 * taught) * forward
    config.distill.accumulate = 48  # parts of two rows, one of each kind
    assert model_flops.step_flops("distill", config, model, 96) == (3 * 96 + 4 * 48) * forward
    config.distill.accumulate = 1
    config.distill.teacher_rule = "heun"
    assert model_flops.step_flops("distill", config, model, 96) == (3 * 96 + 2 * taught) * forward
    config.distill.guidance = 1.0
    guided = 3 * 96 + 2 * taught + 2 * (96 - taught)
    assert model_flops.step_flops("distill", config, model, 96) == guided * forward


# --------------------------------------------------------------------------------------- exchanges


def on_mesh(shape=(8,), names=("d",)):
    return jax.make_mesh(shape, names, (AxisType.Auto,) * len(shape))


@pytest.mark.parametrize("inside", [True, False])
def test_exchanges_count_as_often_as_they_run(inside):
    def products(x_BD, w_SDD):
        def step(total_DD, w_DD):
            product_DD = x_BD.T @ jnp.tanh(x_BD @ w_DD)
            return total_DD + (jax.lax.psum(product_DD, "d") if inside else product_DD), None

        total_DD, _ = jax.lax.scan(step, jnp.zeros(w_SDD.shape[1:]), w_SDD)
        return total_DD if inside else jax.lax.psum(total_DD, "d")

    spread = jax.shard_map(
        products, mesh=on_mesh(), in_specs=(P("d"), P()), out_specs=P(), check_vma=False
    )
    cost, _ = compiled_cost(spread, jnp.zeros((32, 48)), jnp.zeros((6, 48, 48)))
    times, size = 6 if inside else 1, 48 * 48 * 4
    assert cost.by_kind() == {
        "all-reduce": {
            "count": times,
            "bytes": times * size,
            "sent_bytes": times * 2 * size * 7 / 8,
        }
    }
    assert cost.sent_bytes == times * 2 * size * 7 / 8
    assert cost.flops == 6 * 2 * 2 * 4 * 48 * 48  # of the 4 rows that a device has


def test_gathers_count_what_others_send():
    mesh = on_mesh((4, 2), ("a", "b"))
    spread, whole = NamedSharding(mesh, P(None, "a")), NamedSharding(mesh, P())
    x = jax.ShapeDtypeStruct((16, 64), jnp.float32, sharding=spread)
    gather = lambda x: jax.lax.with_sharding_constraint(x, whole)
    table = compiled_cost(gather, x)[0].by_kind()
    size = 16 * 64 * 4
    assert table == {"all-gather": {"count": 1, "bytes": size, "sent_bytes": size * 3 / 4}}


@pytest.mark.parametrize(
    ("groups", "size"),
    [
        ("replica_groups={{0,1},{2,3},{4,5},{6,7}}", 2),
        ("replica_groups=[2,4]<=[4,2]T(1,0)", 4),
        ("replica_groups=mesh['axis_0'=4,'axis_1'=2] {'axis_1'}", 2),
        ("replica_groups=mesh['axis_0'=4,'axis_1'=2] {'axis_0','axis_1'}", 8),
        ("replica_groups=mesh['axis_0'=8] {'axis_0':(2)4}", 4),
        ("replica_groups=mesh['a'=1,'b'=4,'c'=2], device_ids=([2,4]T(1,0)) {'b'}", 4),
        ("replica_groups={}", 8),
    ],
)
@pytest.mark.parametrize(
    ("kind", "operand", "sent"),
    [
        ("all-gather", 1.0, lambda n: n - 1),
        ("reduce-scatter", 1.0, lambda n: (n - 1) / n),
        ("all-reduce", 1.0, lambda n: 2 * (n - 1) / n),
        ("all-to-all", 1.0, lambda n: (n - 1) / n),
    ],
)
def test_bytes_sent_by_each_kind(kind, operand, sent, groups, size):
    text = f"""HloModule toy, num_partitions=8

ENTRY %main (x: f32[40,10]) -> f32[40,10] {{
  %x = f32[40,10]{{1,0}} parameter(0)
  %start = ((f32[40,10]{{1,0}}), f32[40,10]{{1,0}}) {kind}-start(%x), channel_id=1, {groups}
  ROOT %done = f32[40,10]{{1,0}} {kind}-done(%start)
}}
"""
    (one,) = hlo_cost.measure(text).exchanges
    assert (one.kind, one.group, one.times) == (kind, size, 1)
    assert one.sent == pytest.approx(1600 * sent(size))


def test_groups_of_an_unknown_form_are_refused():
    text = GATHER.replace("GROUPS", "replica_groups=ring(2)")
    with pytest.raises(ValueError, match=r"form that isn't known: ring\(2\)"):
        hlo_cost.measure(text)
    assert hlo_cost.measure(GATHER.replace("GROUPS", "replica_groups={}")).exchanges[0].group == 8


GATHER = """HloModule toy, num_partitions=8

ENTRY %main (x: f32[40,10]) -> f32[320,10] {
  %x = f32[40,10]{1,0} parameter(0)
  ROOT %g = f32[320,10]{1,0} all-gather(%x), channel_id=1, GROUPS, dimensions={0}
}
"""


STEPS = """HloModule toy, num_partitions=4

%begin (p: bf16[8,64]) -> (bf16[8,64], bf16[32,64]) {
  %p = bf16[8,64]{1,0} parameter(0)
  %g = bf16[32,64]{1,0} all-gather(%p), channel_id=5, replica_groups={}, ATTRS
  ROOT %s = (bf16[8,64]{1,0}, bf16[32,64]{1,0}) custom-call(%g), TARGET="AsyncCollectiveStart"
}

%beside (p.1: bf16[8,64], q.1: bf16[32,64], y.1: f32[64,64]) -> (f32[64,64], bf16[32,64]) {
  %p.1 = bf16[8,64]{1,0} parameter(0)
  %q.1 = bf16[32,64]{1,0} parameter(1)
  %y.1 = f32[64,64]{1,0} parameter(2)
  %z.1 = f32[64,64]{1,0} dot(%y.1, %y.1), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %g.1 = bf16[32,64]{1,0} all-gather(%p.1), channel_id=5, replica_groups={}, ATTRS
  ROOT %t.1 = (f32[64,64]{1,0}, bf16[32,64]{1,0}) tuple(%z.1, %g.1)
}

%end (p.2: bf16[8,64], q.2: bf16[32,64]) -> bf16[32,64] {
  %p.2 = bf16[8,64]{1,0} parameter(0)
  %q.2 = bf16[32,64]{1,0} parameter(1)
  %g.2 = bf16[32,64]{1,0} all-gather(%p.2), channel_id=5, replica_groups={}, ATTRS
  ROOT %d.2 = bf16[32,64]{1,0} custom-call(%p.2, %q.2, %g.2), TARGET="AsyncCollectiveDone"
}

%scatter (s.3: f32[64,64]) -> f32[16,64] {
  %s.3 = f32[64,64]{1,0} parameter(0)
  %r.3 = f32[64,64]{1,0} all-reduce(%s.3), channel_id=6, replica_groups={}, to_apply=%add
  %i.3 = u32[] partition-id()
  %c.3 = u32[] constant(0)
  ROOT %d.3 = f32[16,64]{1,0} dynamic-slice(%r.3, %i.3, %c.3), dynamic_slice_sizes={16,64}
}

ENTRY %main (x: bf16[8,64], y: f32[64,64]) -> f32[16,64] {
  %x = bf16[8,64]{1,0} parameter(0)
  %y = f32[64,64]{1,0} parameter(1)
  %f = (bf16[8,64]{1,0}, bf16[32,64]{1,0}) fusion(%x), kind=kCustom, calls=%begin
  %a = bf16[8,64]{1,0} get-tuple-element(%f), index=0
  %b = bf16[32,64]{1,0} get-tuple-element(%f), index=1
  %h = (f32[64,64]{1,0}, bf16[32,64]{1,0}) fusion(%a, %b, %y), kind=kOutput, calls=%beside
  %z = f32[64,64]{1,0} get-tuple-element(%h), index=0
  %q = bf16[32,64]{1,0} get-tuple-element(%h), index=1
  %e = bf16[32,64]{1,0} fusion(%a, %q), kind=kCustom, calls=%end
  ROOT %o = f32[16,64]{1,0} fusion(%z), kind=kCustom, calls=%scatter
}
""".replace("ATTRS", 'dimensions={0}, frontend_attributes={chain_id="3"}').replace(
    "TARGET", "custom_call_target"
)


def test_an_exchange_in_several_steps_counts_once_and_fused_scatters_by_what_they_are():
    cost = hlo_cost.measure(STEPS)
    assert [(one.kind, one.num_bytes, one.times) for one in cost.exchanges] == [
        ("all-gather", 32 * 64 * 2, 1),
        ("reduce-scatter", 64 * 64 * 4, 1),
    ]
    assert cost.flops == 2 * 64**3


# -------------------------------------------------------------------------------- memory's traffic


def test_arrays_beside_the_main_memory_cost_no_traffic_of_it():
    text = """HloModule toy

ENTRY %main (x: f32[64,64]) -> f32[64,64] {
  %x = f32[64,64]{1,0} parameter(0)
  %s = (f32[64,64]{1,0}, f32[64,64]{1,0:S(1)}, u32[]{:S(2)}) copy-start(%x)
  %c = f32[64,64]{1,0:S(1)} copy-done(%s)
  %n = f32[64,64]{1,0:S(1)} negate(%c)
  ROOT %e = f32[64,64]{1,0} exponential(%n)
}
"""
    cost = hlo_cost.measure(text)
    assert cost.hbm_bytes == 2 * 64 * 64 * 4  # in once, out once
    assert [kernel.hidden for kernel in cost.kernels] == [True, False]


def test_updates_in_place_cost_what_is_new():
    def write(x_NBD, row_BD):
        return jax.lax.fori_loop(0, 7, lambda i, x: x.at[i].set(row_BD * i), x_NBD)

    shapes = jnp.zeros((7, 256, 64)), jnp.zeros((256, 64))
    cost = hlo_cost.measure(jax.jit(write, donate_argnums=0).lower(*shapes).compile().as_text())
    row = 256 * 64 * 4
    assert 7 * 2 * row <= cost.hbm_bytes < 7 * 4 * row  # not 7 times the stack, 49 rows


# ---------------------------------------------------------------------------------------- roofline


def test_a_roofline_is_the_slower_of_products_and_memory_kernel_by_kernel():
    chip = roofline.Chip(peak_flops=100.0, hbm_bytes=1.0, hbm_rate=10.0, link_rate=5.0)
    kernels = [Kernel("a", 200.0, 10.0, 3), Kernel("b", 0.0, 40.0, 1)]
    exchanges = [Exchange("all-reduce", 10.0, 15.0, 4, 2, "", "f32")]
    found = roofline.estimate(Cost(kernels, exchanges, []), chip)
    assert found == roofline.Estimate(
        compute=6.0,
        memory=7.0,
        exchange=6.0,
        kernels=10.0,
        at_best=10.0,
        one_by_one=16.0,
    )
    # A copy beside other kernels takes no time of its own, but the memory's.
    copies = [Kernel("c", 0.0, 5.0, 1, hidden=True)]
    assert roofline.estimate(Cost(kernels + copies, [], []), chip).kernels == 10.0
    copies = [Kernel("c", 0.0, 50.0, 1, hidden=True)]
    assert roofline.estimate(Cost(kernels + copies, [], []), chip).kernels == 12.0


# ------------------------------------------------------------------------------------------ search


@pytest.mark.parametrize(("largest", "smallest"), [(1, 1), (2, 1), (37, 1), (64, 3), (3, 3)])
def test_search_finds_the_largest_and_asks_nothing_twice(largest, smallest):
    asked = []

    def fits(count):
        asked.append(count)
        return count <= largest

    assert ahead.search_largest(fits, smallest=smallest) == largest
    assert len(asked) == len(set(asked)) <= 2 * np.log2(largest + 2) + 3
    assert min(asked) == smallest
    assert ahead.search_largest(lambda count: False, smallest=smallest) is None


@pytest.mark.parametrize(
    ("text", "needed"),
    [
        (
            "RESOURCE_EXHAUSTED: E1000: .. temporaries (351.88G) exceeds available HBM (15.75G).",
            351.88,
        ),
        (
            "RESOURCE_EXHAUSTED: Ran out of memory in hbm. Used 20.50G of 15.75G hbm.",
            20.5,
        ),
        ("RESOURCE_EXHAUSTED: Out of memory.", None),
    ],
)
def test_a_program_too_large_is_a_row(text, needed):
    def refuse():
        raise jax.errors.JaxRuntimeError(text)

    target = ahead.Target("toy", [None], None, 100.0, True)
    program = ahead.Program(
        "train",
        lambda rows: types.SimpleNamespace(compile=refuse),
        float,
        lambda rows: rows,
    )
    row = ahead.judge(program, 8, target)
    assert row["fits"] is False
    assert row["total"] == (None if needed is None else pytest.approx(needed * 2**30))
    assert row["batch"] == 8


def test_other_errors_of_the_compiler_are_errors():
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        ahead.needed_bytes(jax.errors.JaxRuntimeError("INTERNAL: a bug"))


def test_a_compiler_that_jax_cannot_read_is_named():
    def refuse():
        raise jax.errors.JaxRuntimeError("INTERNAL: RET_CHECK failure\nand a stack")

    program, target = toy_program(largest=8)

    def lower(rows):
        made = program.lower(rows).compile()
        made.as_text = refuse
        return types.SimpleNamespace(compile=lambda: made)

    with pytest.raises(
        ValueError, match=r"fsdfm_jax\[tpu\]'. It said: INTERNAL: RET_CHECK failure$"
    ):
        ahead.judge(program._replace(lower=lower), 8, target)


# ---------------------------------------------------------------------------------------- programs


def small_config(**mesh):
    config = tiny.get_config("smoke")
    config.model.width = 32
    config.mesh.update(mesh)
    return config


LOCAL = ahead.find_target("local")


def test_the_programs_of_a_run_on_a_mesh():
    config = small_config(data=2, fsdp=4)
    config.model.num_blocks = 3
    mesh = ahead.make_mesh(config, LOCAL)
    train, sample = ahead.make_programs(ahead.KINDS, "pretrain", config, mesh, steps=3)
    row = ahead.judge(train, 16, LOCAL)
    process = ahead.make_process(config)
    stage = stages.make_stage("pretrain", config, process)
    abstract = jax.eval_shape(lambda key: stage.init_params(key, None), jax.random.key(0))
    held = sum(leaf.device_bytes for leaf in mesh_lib.describe(mesh, abstract))
    # Parameters and two moments, spread by the rules; in addition the tokens and the key.
    assert row["arguments"] == pytest.approx(3 * held, rel=0.02)
    assert row["total"] >= row["arguments"] + row["temporaries"]
    assert row["fits"] is None
    assert row["unknown_loops"] == 0
    assert row["useful_flops"] == train.useful_flops(16) / 8
    # The smoke config computes norms and the like again, no products; logits in two chunks.
    assert row["flops"] == pytest.approx(row["useful_flops"], rel=0.2)
    assert row["exchanges"]["all-gather"]["count"] >= 2 * 3
    row = ahead.judge(sample, 16, LOCAL)
    assert row["arguments"] == pytest.approx(held, rel=0.1)
    assert row["flops"] == pytest.approx(row["useful_flops"], rel=0.2)
    assert row["exchanges"]["all-gather"]["count"] >= 3 * 3  # in each step, each block


@pytest.mark.parametrize("name", ["autoregressive", "step_aware", "refine"])
def test_the_other_stages_are_lowered(name):
    config = small_config(fsdp=8)
    mesh = ahead.make_mesh(config, LOCAL)
    program = ahead.train_program(name, config, ahead.make_process(config), mesh)
    assert program.lower(16).as_text()
    assert program.useful_flops(16) > 0


def test_rows_must_spread_evenly():
    config = small_config(data=2, fsdp=4)
    mesh = ahead.make_mesh(config, LOCAL)
    config.distill.accumulate = 3
    units = [ahead.unit_of_rows(kind, "distill", config, mesh) for kind in ahead.KINDS]
    assert units == [24, 8]  # the sampler makes no parts
    ahead.check_rows("train", "distill", config, mesh, 48, "--batch")
    ahead.check_rows("sampler", "distill", config, mesh, 16, "--batch")
    with pytest.raises(ValueError, match=r"--batch=12 must be a positive multiple of the 8 data"):
        ahead.check_rows("train", "distill", config, mesh, 12, "--batch")
    with pytest.raises(ValueError, match=r"--batch=16 must be a multiple of distill.accumulate=3"):
        ahead.check_rows("train", "distill", config, mesh, 16, "--batch")


@pytest.mark.parametrize(
    "name", ["", "v5e", "v5e:", "v5e:0x4", "v5e:4x", "v9:2x2", "v5e:4x4; rm", "h100:1"]
)
def test_other_names_of_topologies_are_refused(name):
    with pytest.raises(ValueError, match=r"expected 'local' or KIND:SHAPE.*v5e, v5p, v6e"):
        ahead.find_target(name)


def test_without_the_compiler_the_extra_is_named(monkeypatch):
    def missing(**_):
        raise RuntimeError("JAX TPU support not installed; cannot generate TPU topology.")

    monkeypatch.setattr(ahead.topologies, "get_topology_desc", missing)
    with pytest.raises(ValueError, match=r"pip install 'fsdfm_jax\[tpu\]'"):
        ahead.find_target("v5e:2x2")


def test_variations_of_a_key():
    config = small_config()
    assert list(ahead.variations(config, [])) == [("", config)]
    asked = ["model.remat=none|full", "distill.accumulate=2", "seed=7"]
    found = list(ahead.variations(config, asked))
    assert [label for label, _ in found] == [
        "remat=none",
        "remat=full",
        "accumulate=2",
        "seed=7",
    ]
    assert [one.model.remat for _, one in found] == ["none", "full", "dots", "dots"]
    assert [one.distill.accumulate for _, one in found] == [1, 1, 2, 1]
    assert found[3][1].seed == 7
    assert config.model.remat == "dots"


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (
            "model.remta=none",
            r"unknown configuration key config.model.remta.*config.model.remat",
        ),
        ("model.width=wide", r"'wide' is no int, as model.width is"),
        ("model=3", r"unknown configuration key config.model"),
        ("eval.steps=1", r"--vary takes numbers and names, and eval.steps is a tuple"),
    ],
)
def test_variations_that_cannot_be(asked, message):
    with pytest.raises(ValueError, match=message):
        list(ahead.variations(small_config(), [asked]))


def test_the_stage_that_is_meant():
    config = base.get_config()
    assert ahead.choose_stage(config, None) == "distill"
    assert ahead.choose_stage(config, "refine") == "refine"
    config.pipeline = "autoregressive, pretrain"
    assert ahead.choose_stage(config, None) == "pretrain"


def test_programs_that_cannot_be():
    config = small_config()
    mesh = ahead.make_mesh(config, LOCAL)
    with pytest.raises(ValueError, match=r"--what takes some of train, sampler, got \['tests'\]"):
        ahead.make_programs(["tests"], "distill", config, mesh, steps=1)
    with pytest.raises(ValueError, match=r"'autoregressive' has no few-step sampler"):
        ahead.make_programs(["sampler"], "autoregressive", config, mesh, steps=1)
    config.mesh.fsdp = 3
    with pytest.raises(ValueError, match=r"must multiply to the 8 device"):
        ahead.make_mesh(config, LOCAL)


def test_described_chips_have_the_attention_of_their_kind():
    config = small_config()
    described = LOCAL._replace(described=True)
    assert ahead.fit_config(config, described).model.attention == "xla"
    assert ahead.fit_config(config, LOCAL).model.attention == "auto"
    config.model.attention = "manual"
    assert ahead.fit_config(config, described).model.attention == "manual"


def toy_program(largest):
    """A program that takes 10 bytes a row."""

    def lower(rows):
        lowered = jax.jit(lambda x: x).lower(jnp.zeros(1))
        memory = types.SimpleNamespace(
            output_size_in_bytes=4,
            alias_size_in_bytes=4,
            argument_size_in_bytes=5 * rows,
            temp_size_in_bytes=4 * rows,
            generated_code_size_in_bytes=2 * rows,
            peak_memory_in_bytes=10 * rows,
        )
        text = lowered.compile().as_text()
        made = types.SimpleNamespace(memory_analysis=lambda: memory, as_text=lambda: text)
        return types.SimpleNamespace(compile=lambda: made)

    target = ahead.Target("toy", [None], None, 10.0 * largest, True)
    return ahead.Program("train", lower, float, lambda rows: rows), target


def test_the_largest_batch_is_of_whole_shards():
    program, target = toy_program(largest=77)
    known, lines = {}, []
    options = {"unit": 8, "smallest": 2, "known": known, "report": lines.append}
    row = ahead.find_largest(program, target, **options)
    assert (row["batch"], row["total"], row["fits"]) == (72, 720, True)
    assert set(known) == {8, 16, 32, 64, 128, 96, 80, 72}
    assert lines[-1] == "largest batch, train: 72 rows take 0.00 of 0.00 GB: fits"
    assert (row["arguments"], row["temporaries"], row["code"]) == (360, 216, 144)
    # What is added up for real devices, gaps and all.
    summed = ahead.judge(program, 72, target._replace(described=False))
    assert (summed["total"], summed["fits"]) == (792, False)
    options["known"] = {}
    assert ahead.find_largest(program, target._replace(hbm_bytes=79), **options) is None
    with pytest.raises(ValueError, match="needs to know the memory of a device, and toy doesn't"):
        ahead.find_largest(program, target._replace(hbm_bytes=None), **options)


# ------------------------------------------------------------------------------------- the program


def run(*arguments, config="configs/tiny.py:smoke"):
    """The program in a process of its own, with 8 devices: it has its own flags, as others do."""
    code = (
        "import jax, runpy, sys; jax.config.update('jax_num_cpu_devices', 8);"
        "sys.argv[0] = 'launch.aot_compile'; runpy.run_module(sys.argv[0], run_name='__main__')"
    )
    command = [sys.executable, "-c", code, f"--config={config}", *arguments]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def test_the_program_prints_a_table_and_writes_what_it_found(tmp_path):
    found = run(
        "--topology=local",
        "--stage=pretrain",
        "--config.mesh.fsdp=4",
        "--vary=model.num_blocks=1|2",
        "--what=sampler",
        "--steps=1",
        "--batch=8",
        f"--output={tmp_path / 'out.json'}",
    )
    assert found.returncode == 0, found.stderr
    lines = found.stdout.splitlines()
    assert lines[0] == "stage pretrain, blocks of 64 tokens"
    shown = [line.split() for line in lines if line.startswith("local")]
    places = ["local", "2x4x1"]
    first = [[*places, f"num_blocks={count}", "sampler", "8"] for count in (1, 2)]
    assert [line[:5] for line in shown] == first + first  # of both tables
    one, two = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert [one["case"], two["case"]] == ["num_blocks=1", "num_blocks=2"]
    assert two["flops"] > 1.1 * one["flops"]
    assert two["arguments"] > one["arguments"]
    assert "all-gather" in one["exchanges"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--topology=v5e:4by4"], "Unknown --topology='v5e:4by4'"),
        (
            ["--topology=local", "--batch=12"],
            "--batch=12 must be a positive multiple of the 8",
        ),
        (
            ["--topology=local", "--largest_batch"],
            "needs to know the memory of a device",
        ),
    ],
)
def test_wrong_input_is_one_line(arguments, message):
    found = run(*arguments)
    assert found.returncode == 2
    (line,) = found.stderr.splitlines()
    assert line.startswith("error: ")
    assert message in line


# ------------------------------------------------------------------------- the real TPU's compiler


def test_a_small_pod_is_compiled_for(tmp_path):
    """One small topology, where the TPU compiler is installed."""
    pytest.importorskip("libtpu")
    found = run(
        "--topology=v5e:2x4",
        "--config.mesh.fsdp=2",
        "--config.mesh.tensor=2",
        f"--output={tmp_path / 'out.json'}",
    )
    assert found.returncode == 0, found.stderr
    train, sample = json.loads((tmp_path / "out.json").read_text())["rows"]
    for row in (train, sample):
        assert row["mesh"] == "2x2x2"
        assert row["fits"] is True
        assert row["unknown_loops"] == 0
        assert row["flops"] == pytest.approx(row["useful_flops"], rel=0.5)
        assert row["hbm"] == 15.75 * 2**30
        assert 0 < row["seconds"]["at_best"] <= row["seconds"]["one_by_one"]
        assert 0 < row["mfu"][0] <= row["mfu"][1] < 1
    assert train["exchanges"]["all-gather"]["count"] >= 2

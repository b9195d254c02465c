"""Sharding of activations and gradients on the eight CPU devices of conftest.py."""

import contextlib
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from fsdfm_jax.flow import losses
from fsdfm_jax.ops import logits as logits_lib
from fsdfm_jax.ops.logits import Factored
from fsdfm_jax.parallel import mesh as mesh_lib
from fsdfm_jax.parallel import rules

MESHES = [(8, 1, 1), (1, 8, 1), (2, 2, 2), (1, 2, 4)]


def mesh_of(sizes):
    sizes = dict(zip(rules.AXES, sizes, strict=True))
    return mesh_lib.make_mesh(ConfigDict(sizes | {"slices": 1}))


def laid_out(fn, sizes, *args):
    """(the result of fn under jit on a mesh, its spec)."""
    mesh = mesh_of(sizes)
    with jax.set_mesh(mesh):
        result = jax.jit(fn)(*args)
    spec = result.sharding.spec
    return result, tuple(spec) + (None,) * (result.ndim - len(spec))


def test_without_a_mesh_nothing_happens():
    x = jnp.ones((3, 5))
    for result in (
        rules.constrain(x, "rows", "hidden"),
        rules.pad_rows(x),
        rules.gather(x, "head/kernel"),
        rules.stored(x, "head/kernel"),
    ):
        assert result is x
    assert rules.shards("rows") == rules.shards("positions") == rules.shards(None) == 1
    text = jax.make_jaxpr(lambda x: rules.gather(rules.pad_rows(x), "head/kernel"))(x)
    assert "constraint" not in str(text)


@pytest.mark.parametrize("sizes", MESHES)
def test_shards(sizes):
    data, fsdp, tensor = sizes
    with jax.set_mesh(mesh_of(sizes)):
        got = {name: rules.shards(name) for name in rules.ACTIVATIONS}
    assert got == {
        "rows": data * fsdp,
        "heads": tensor,
        "hidden": tensor,
        "positions": tensor,
        "parts": 8,
        "replicas": data,
        "spread": fsdp * tensor,
        None: 1,
    }


def test_activations_lie_where_their_names_say():
    x = jnp.arange(8.0 * 4 * 6 * 5).reshape(8, 4, 6, 5)
    double = lambda *names: lambda x: rules.constrain(x, *names) * 2
    for names, want in [
        (("rows",), (("data", "fsdp"), None, None, None)),
        (("rows", "heads"), (("data", "fsdp"), "tensor", None, None)),
        (("rows", None, "positions"), (("data", "fsdp"), None, "tensor", None)),
        (("replicas", "spread"), ("data", ("tensor", "fsdp"), None, None)),
    ]:
        got, spec = laid_out(double(*names), (2, 2, 2), x)
        assert spec == want, names
        np.testing.assert_array_equal(got, 2 * x)


def test_a_dimension_that_does_not_divide_is_left_to_the_compiler():
    x = jnp.ones((3, 4))
    got, spec = laid_out(lambda x: rules.constrain(x, "rows", "heads") * 2, (2, 2, 2), x)
    assert spec[1] == "tensor"
    np.testing.assert_array_equal(got, 2 * x)


def test_padding_repeats_the_last_row():
    x = jnp.arange(12).reshape(6, 2)
    got, spec = laid_out(rules.pad_rows, (2, 2, 2), x)
    assert spec[0] == ("data", "fsdp")
    np.testing.assert_array_equal(got, [*x.tolist(), [10, 11], [10, 11]])
    got, _ = laid_out(rules.pad_rows, (2, 2, 2), x[:4])
    np.testing.assert_array_equal(got, x[:4])


WEIGHTS = [
    ("blocks/q_proj/kernel", (2, 16, 24), P(None, "fsdp", "tensor"), (None, None, "tensor")),
    ("blocks/mlp_out/kernel", (2, 16, 24), P(None, "tensor", "fsdp"), (None, "tensor", None)),
    ("head/kernel", (16, 11), P(("tensor", "fsdp"), None), (None, None)),
    ("final_adaln/modulation/kernel", (4, 16), P(None, ("tensor", "fsdp")), (None, None)),
    ("final_norm/scale", (16,), P(), (None,)),
]


@pytest.mark.parametrize(("path", "shape", "stored", "used"), WEIGHTS)
def test_a_weight_is_gathered_and_its_gradient_goes_back(path, shape, stored, used):
    mesh = mesh_of((2, 2, 2))
    rng = np.random.default_rng(0)
    weight = jax.device_put(
        rng.standard_normal(shape).astype(np.float32), NamedSharding(mesh, stored)
    )
    with jax.set_mesh(mesh):
        whole = jax.jit(lambda w: rules.gather(w, path))(weight)
        # The loss sums over rows that are spread: so must the gradient.
        rows = jax.device_put(np.arange(8.0, dtype=np.float32), mesh_lib.batch_sharding(mesh))
        loss = lambda w, x: jnp.sum(jax.vmap(lambda a: a * jnp.sin(rules.gather(w, path)))(x))
        gradient = jax.jit(jax.grad(loss))(weight, rows)
    assert whole.sharding.is_equivalent_to(NamedSharding(mesh, P(*used)), len(shape))
    np.testing.assert_array_equal(whole, weight)
    assert gradient.sharding.is_equivalent_to(NamedSharding(mesh, stored), len(shape))
    np.testing.assert_allclose(gradient, 28 * np.cos(weight), rtol=1e-5)


def test_one_block_out_of_a_stack_lies_as_the_stack_does():
    mesh, path = mesh_of((2, 2, 2)), "blocks/q_proj/kernel"
    stack = jax.device_put(np.ones((2, 16, 24), np.float32), NamedSharding(mesh, P(None, "fsdp")))
    with jax.set_mesh(mesh):
        block = jax.jit(lambda w: rules.gather(w[0], path))(stack)
        gradient = jax.jit(jax.grad(lambda w: jnp.sum(rules.gather(w, path) ** 2)))(stack[0])
    assert block.sharding.is_equivalent_to(NamedSharding(mesh, P(None, "tensor")), 2)
    assert gradient.sharding.is_equivalent_to(NamedSharding(mesh, P("fsdp", "tensor")), 2)


def test_gradients_lie_as_parameters_do():
    mesh = mesh_of((2, 2, 2))
    tree = {"head": {"kernel": jnp.ones((16, 11))}, "final_norm": {"scale": jnp.ones(16)}}
    with jax.set_mesh(mesh):
        placed = jax.jit(lambda tree: rules.like_parameters(jax.tree.map(jnp.sin, tree)))(tree)
    want = mesh_lib.state_shardings(mesh, tree)
    same = lambda leaf, place: leaf.sharding.is_equivalent_to(place, leaf.ndim)
    assert jax.tree.all(jax.tree.map(same, placed, want))


# ------------------------------------------------------------------------------- the head's chunks


def head_loss(logits, xt_BL, x1_BL, weight_BL, *, num_rows):
    return logits_lib.mean_loss(
        losses.path_loss,
        logits_lib.pad_rows(logits),
        *(rules.pad_rows(x) for x in (xt_BL, x1_BL, weight_BL)),
        num_rows=num_rows,
    )


def head_inputs(rows, length, width=16, vocab_size=11, chunk=48):
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)
    logits = Factored(
        draw(rows, length, width),
        draw(width, vocab_size),
        draw(vocab_size),
        # A chunk of so many positions on one device, of more on several.
        chunk_size=chunk * vocab_size,
    )
    tokens = rng.integers(vocab_size, size=(2, rows, length)).astype(np.int32)
    return logits, *tokens, np.abs(draw(rows, length))


HEADS = [((1, 8, 1), 6), ((2, 2, 2), 16)]
MORE_HEADS = [(sizes, rows) for sizes in MESHES for rows in (6, 16) if (sizes, rows) not in HEADS]
MORE_HEADS = [pytest.param(*case, marks=pytest.mark.slow) for case in MORE_HEADS]


@pytest.mark.parametrize(("sizes", "rows"), [*HEADS, *MORE_HEADS])
def test_the_loss_of_the_head_on_a_mesh(sizes, rows):
    """Value and gradients are those of one device; each is exchanged once, not at each chunk."""
    inputs = head_inputs(rows, 96)
    both = jax.value_and_grad(functools.partial(head_loss, num_rows=rows))
    want = jax.jit(both)(*inputs)
    mesh = mesh_of(sizes)

    def spread(logits, *others):
        rule = rules.spec_for("head/kernel")
        kernel = jax.device_put(logits.kernel_DV, NamedSharding(mesh, rule))
        is_even = rows % mesh_lib.row_shards(mesh) == 0
        even = mesh_lib.batch_sharding(mesh) if is_even else mesh_lib.whole(mesh)
        others = [jax.device_put(x, even) for x in (logits.features_BLD, *others)]
        bias = jax.device_put(logits.bias_V, mesh_lib.whole(mesh))
        placed = Factored(others[0], kernel, bias, chunk_size=logits.chunk_size)
        return placed, *others[1:]

    with jax.set_mesh(mesh):
        placed = spread(*inputs)
        compiled = jax.jit(both).lower(*placed).compile()
        got = compiled(*placed)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), got, want)
    kernel = got[1].kernel_DV
    assert kernel.sharding.is_equivalent_to(placed[0].kernel_DV.sharding, 2)
    bodies = re.split(r"\n(?=\S)", compiled.as_text())
    assert any("while(" in body for body in bodies), "one chunk: nothing is tested"
    summing = re.compile(r"(all-reduce|all-gather|reduce-scatter)(-start)?\(")
    exchanging = [body.split()[0] for body in bodies if summing.search(body)]
    assert exchanging == ["ENTRY"]


@pytest.mark.parametrize(("sizes", "rounds"), [(None, 96), ((1, 8, 1), 24), ((2, 2, 2), 24)])
def test_chunks_go_by_what_a_device_holds(sizes, rounds):
    """Half a position of all 16 rows fits one device: four positions fit eight of them."""
    inputs = head_inputs(16, 96, chunk=8)
    loss = functools.partial(head_loss, num_rows=16)
    with mesh_lib.use(mesh_of(sizes)) if sizes else contextlib.nullcontext():
        jaxpr = str(jax.make_jaxpr(loss)(*inputs))
    assert re.findall(r"length=(\d+)", jaxpr) == [str(rounds)]

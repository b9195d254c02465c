"""One optimiser step: accumulation against a manual computation, and non-finite steps."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_train import assert_same_bits, make_mesh, make_stage, toy_stage

from configs import base as base_config
from fsdfm_jax import main
from fsdfm_jax.parallel import mesh as mesh_lib
from fsdfm_jax.stages import Auxiliary, Frozen
from fsdfm_jax.training import loop as loop_lib
from fsdfm_jax.training import state
from fsdfm_jax.training.optim import Turns

B, L = 16, 3
RATE, DECAY = 0.25, 0.75
KEY = jax.random.key(5)


def loss(params, frozen, key, batch):
    """A loss that isn't a mean over rows: noise, a square of means, a root."""
    noise = jax.random.normal(key, (2,))
    x = batch["x1"].astype(jnp.float32).mean(0)[:2] - batch["x0"].mean()
    value = jnp.sum((params["w"] * x + noise) ** 2) + jnp.sum(params["w"] * frozen.average["w"])
    return value, {"loss": value, "root": jnp.sqrt(jnp.abs(x).sum())}


def make_batch(rows=B):
    rng = np.random.default_rng(3)
    return {
        "x1": rng.integers(0, 9, (rows, L)).astype(np.int32),
        "x0": rng.normal(size=(rows, L)).astype(np.float32),
    }


def start(optimizer, *, step=7, ema=(0.5, -1.0)):
    now = state.init_state({"w": jnp.asarray([2.0, -3.0])}, optimizer, ema_decay=DECAY)
    return now._replace(step=jnp.int32(step), ema={"w": jnp.asarray(ema)})


def step_of(loss, optimizer, **values):
    return jax.jit(
        functools.partial(
            state.train_step, loss=loss, optimizer=optimizer, ema_decay=DECAY, **values
        )
    )


def by_hand(now, batch, parts, *, fold):
    """Gradient and metrics as the mean over the parts, each with its rows and its key."""
    key = jax.random.fold_in(KEY, int(now.step))
    grads, metrics = [], []
    for a in range(parts):
        rows = {name: x[a::parts] for name, x in batch.items()}
        part_key = jax.random.fold_in(key, a) if fold else key
        found = jax.grad(loss, has_aux=True)(now.params, Frozen(now.ema), part_key, rows)
        grads.append(np.asarray(found[0]["w"], np.float64))
        metrics.append({name: float(value) for name, value in found[1].items()})
    return np.mean(grads, 0), {key: np.mean([m[key] for m in metrics]) for key in metrics[0]}


@pytest.mark.parametrize("parts", [1, 2, 4, 16])
def test_a_batch_in_parts_is_the_mean_of_its_parts(parts):
    optimizer, batch = optax.sgd(RATE), make_batch()
    now = start(optimizer)
    after, metrics = step_of(loss, optimizer, accumulate=parts)(now, batch, KEY)
    grad, want = by_hand(now, batch, parts, fold=parts > 1)
    weights = np.asarray(now.params["w"]) - RATE * grad
    np.testing.assert_allclose(after.params["w"], weights, rtol=1e-5)
    average = DECAY * np.asarray(now.ema["w"]) + (1 - DECAY) * weights
    np.testing.assert_allclose(after.ema["w"], average, rtol=1e-5)
    want["grad_norm"] = np.linalg.norm(grad)
    assert metrics.keys() == want.keys()
    assert {name: float(value) for name, value in metrics.items()} == pytest.approx(want, rel=1e-5)
    assert all(value.dtype == jnp.float32 and value.shape == () for value in metrics.values())
    assert (int(after.step), int(after.skipped)) == (8, 0)


def test_parts_have_keys_of_their_own():
    optimizer, batch = optax.sgd(RATE), make_batch()
    now = start(optimizer)
    grad, _ = by_hand(now, batch, 4, fold=True)
    with jax.debug_key_reuse(False):
        same_key, _ = by_hand(now, batch, 4, fold=False)
    assert np.abs(grad - same_key).max() > 0.1  # or the test above would show nothing


def test_rows_of_a_part_are_on_all_devices():
    """With a mesh: part a has the rows a, a + A .., and the result is that of one device."""
    optimizer, batch = optax.adam(RATE), make_batch()
    settings = loop_lib.Settings(9, B, 1, 1, DECAY, accumulate=2)
    mesh, stage = make_mesh(), toy_stage(loss)
    with jax.set_mesh(mesh):
        now = jax.jit(lambda: start(optimizer))()
        shardings = mesh_lib.state_shardings(mesh, now)
        step = loop_lib.make_step(stage, optimizer, settings, mesh, shardings)
        rows = mesh_lib.place_rows(mesh, B, batch)
        after, metrics = step(jax.device_put(now, shardings), rows, KEY, None)
    want, want_metrics = step_of(loss, optimizer, accumulate=2)(start(optimizer), batch, KEY)
    for got, values in ((after.params, want.params), (metrics, want_metrics)):
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), got, values)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["pretrain", "distill"])
def test_a_real_stage_in_parts(name):
    stage, optimizer, _ = make_stage(name)
    rng = np.random.default_rng(0)
    batch = {"x1": rng.integers(0, 11, (8, 6)).astype(np.int32)}
    fresh, _, _ = make_stage("pretrain")
    base = jax.jit(fresh.init_params)(jax.random.key(0), None)
    now = jax.jit(
        lambda: state.init_state(
            stage.init_params(jax.random.key(1), None if name == "pretrain" else base),
            optimizer,
            ema_decay=DECAY,
        )
    )()
    _, metrics = step_of(stage.loss, optimizer, accumulate=2)(now, batch, KEY)
    gradient = jax.jit(jax.value_and_grad(stage.loss, has_aux=True))
    key, found = jax.random.fold_in(KEY, 0), []
    for a in range(2):
        rows = {"x1": batch["x1"][a::2]}
        found.append(gradient(now.params, Frozen(now.ema), jax.random.fold_in(key, a), rows))
    values = np.mean([float(value) for (value, _), _ in found])
    np.testing.assert_allclose(metrics["loss"], values, rtol=1e-4)
    mean = jax.tree.map(lambda *x: sum(x) / 2, *(grads for _, grads in found))
    np.testing.assert_allclose(metrics["grad_norm"], optax.tree.norm(mean), rtol=1e-4)


# -------------------------------------------------------------------------------------------- turns


def student_loss(params, frozen, key, batch):
    """`loss`, pulled by the other network."""
    value, metrics = loss(params, frozen, key, batch)
    value = value + jnp.sum(params["w"] * frozen.partner["w"] ** 2)
    return value, metrics | {"loss": value}


def learn(params, frozen, key, batch):
    """Follow the student and the average, with noise."""
    x = batch["x1"].astype(jnp.float32).mean(0)[:2]
    target = x * frozen.partner["w"] + frozen.average["w"] + jax.random.normal(key, (2,))
    value = jnp.sum((params["w"] - target) ** 2)
    return value, {"loss": value}


def make_turns(updates, loss=learn, optimizer=None):
    return Turns(Auxiliary(loss, updates, 1.0), optimizer or optax.sgd(0.01))


def start_turns(optimizer, turns):
    """Separate weights for each network."""
    params = {"w": jnp.asarray([2.0, -3.0])}
    now = state.init_state(params, optimizer, ema_decay=DECAY, turns=turns)
    own = now.auxiliary._replace(params={"w": jnp.asarray([1.0, 0.5])})
    return now._replace(step=jnp.int32(7), ema={"w": jnp.asarray([0.5, -1.0])}, auxiliary=own)


def mean_gradient(loss, params, frozen, key, batch, parts):
    """(gradient of one network alone, loss) as the mean over the parts of a batch."""
    found = []
    for a in range(parts):
        rows = {name: x[a::parts] for name, x in batch.items()}
        part_key = jax.random.fold_in(key, a) if parts > 1 else key
        found.append(jax.value_and_grad(loss, has_aux=True)(params, frozen, part_key, rows))
    grad = np.mean([np.asarray(grads["w"], np.float64) for _, grads in found], axis=0)
    return grad, np.mean([float(value) for (value, _), _ in found])


@pytest.mark.parametrize(("updates", "parts"), [(1, 1), (3, 1), (2, 4)])
def test_the_second_network_has_its_turns_before_the_first(updates, parts):
    optimizer, batch, turns = optax.sgd(RATE), make_batch(), make_turns(updates)
    now = start_turns(optimizer, turns)
    step = step_of(student_loss, optimizer, accumulate=parts, turns=turns)
    after, metrics = step(now, batch, KEY)

    key, turns_key = jax.random.split(jax.random.fold_in(KEY, 7))
    frozen = Frozen(now.ema, {}, now.params)  # of the student as it was
    own, losses, norms = np.asarray(now.auxiliary.params["w"]), [], []
    for turn in range(updates):
        params = {"w": jnp.asarray(own, jnp.float32)}
        turn_key = jax.random.fold_in(turns_key, turn)
        grad, value = mean_gradient(learn, params, frozen, turn_key, batch, parts)
        own = own - 0.01 * grad
        losses.append(value)
        norms.append(np.linalg.norm(grad))
    np.testing.assert_allclose(after.auxiliary.params["w"], own, rtol=1e-5)
    frozen = Frozen(now.ema, {}, {"w": jnp.asarray(own, jnp.float32)})  # as it is after its turns
    grad, value = mean_gradient(student_loss, now.params, frozen, key, batch, parts)
    weights = np.asarray(now.params["w"]) - RATE * grad
    np.testing.assert_allclose(after.params["w"], weights, rtol=1e-5)
    # Only the student has an average.
    np.testing.assert_allclose(
        after.ema["w"], DECAY * np.asarray(now.ema["w"]) + (1 - DECAY) * weights, rtol=1e-5
    )
    want = {"loss": value, "grad_norm": np.linalg.norm(grad)}
    want |= {"auxiliary_loss": np.mean(losses), "auxiliary_grad_norm": np.mean(norms)}
    got = {name: float(value) for name, value in metrics.items() if name != "root"}
    assert got == pytest.approx(want, rel=1e-5)
    assert int(after.step) == 8


def test_no_two_draws_of_a_step_have_the_same_key():
    """Nor does what one loss splits off the key of another, where `fold_in` gives the same."""
    seen = []

    def watching(params, frozen, key, batch):
        del frozen, batch
        for each in (key, *jax.random.split(jax.random.clone(key), 4)):
            jax.debug.callback(lambda data: seen.append(tuple(data.tolist())), _data(each))
        value = jnp.sum(params["w"] ** 2)
        return value, {"loss": value}

    optimizer, turns = optax.sgd(RATE), make_turns(3, watching)
    for parts in (1, 4):
        seen.clear()
        step = step_of(watching, optimizer, accumulate=parts, turns=turns)
        jax.block_until_ready(step(start_turns(optimizer, turns), make_batch(), KEY))
        jax.effects_barrier()
        assert len(seen) == len(set(seen)) == 5 * parts * (1 + 3)


def _data(key):
    return jax.random.key_data(jax.random.clone(key))


def test_the_second_network_starts_as_the_first_with_its_own_optimiser():
    turns = make_turns(2, optimizer=optax.adam(0.1))
    params = {"w": jnp.asarray([2.0, -3.0])}
    now = state.init_state(params, optax.sgd(RATE), ema_decay=DECAY, turns=turns)
    assert_same_bits(now.auxiliary, state.AuxiliaryState(params, turns.optimizer.init(params)))
    assert state.init_state(params, optax.sgd(RATE), ema_decay=DECAY).auxiliary is None


@pytest.mark.parametrize("which", ["student", "auxiliary"])
def test_a_skipped_step_leaves_both_networks(which):
    """Either of the two may be non-finite, in any turn."""

    def bad(learn):
        def broken(params, frozen, key, batch):
            value, metrics = learn(params, frozen, key, batch)
            # In half of the turns: one of them is enough.
            hit = jax.random.bernoulli(jax.random.clone(key)) | (learn is student_loss)
            value = value + jnp.where(jnp.any(batch["x1"] < 0) & hit, jnp.nan, 0.0)
            return value, metrics | {"loss": value}

        return broken

    own = bad(learn) if which == "auxiliary" else learn
    first = bad(student_loss) if which == "student" else student_loss
    optimizer, turns = optax.adam(RATE), make_turns(4, own, optax.adam(0.1))
    step = step_of(first, optimizer, max_skipped=3, turns=turns)
    batch = make_batch()
    good, metrics = step(start_turns(optimizer, turns), batch, KEY)
    assert metrics["skipped"] == 0
    poisoned = {"x1": batch["x1"].copy(), "x0": batch["x0"]}
    poisoned["x1"][5, 0] = -1
    after, metrics = step(good, poisoned, KEY)
    assert metrics["skipped"] == 1
    assert int(after.step) == 9
    kept = ("params", "ema", "opt_state", "auxiliary")
    assert_same_bits(*([getattr(one, name) for name in kept] for one in (after, good)))
    after, _ = step(after, batch, KEY)
    assert np.any(np.asarray(after.auxiliary.params["w"]) != np.asarray(good.auxiliary.params["w"]))


# ------------------------------------------------------------------------------------------ skipped


def fragile(params, frozen, key, batch):
    """Not finite where a token is negative."""
    value, metrics = loss(params, frozen, key, batch)
    value = value + jnp.where(jnp.any(batch["x1"] < 0), jnp.inf, 0.0)
    return value, metrics | {"loss": value}


@pytest.mark.parametrize("parts", [1, 4])
def test_one_bad_part_skips_the_whole_step(parts):
    optimizer, batch = optax.adam(RATE), make_batch()
    step = step_of(fragile, optimizer, accumulate=parts, max_skipped=3)
    good, metrics = step(start(optimizer), batch, KEY)
    assert metrics["skipped"] == 0
    assert metrics["skipped"].dtype == jnp.float32
    bad = {"x1": batch["x1"].copy(), "x0": batch["x0"]}
    bad["x1"][5, 0] = -1
    after, count = good, 0
    for count in (1, 2, 3, 4):  # it counts on; to stop is up to the caller
        after, metrics = step(after, bad, KEY)
        assert (float(metrics["skipped"]), int(after.skipped)) == (count, count)
        assert int(after.step) == 8 + count
        assert_same_bits(
            (after.params, after.ema, after.opt_state), (good.params, good.ema, good[3])
        )
    after, metrics = step(after, batch, KEY)
    assert (float(metrics["skipped"]), int(after.skipped)) == (0, 0)
    assert np.any(np.asarray(after.params["w"]) != np.asarray(good.params["w"]))


def test_without_skipping_what_is_not_finite_goes_through():
    """The caller must see it in the metrics, in order to stop."""
    optimizer, batch = optax.adam(RATE), make_batch()
    batch["x1"][5, 0] = -1
    _, metrics = step_of(fragile, optimizer)(start(optimizer), batch, KEY)
    assert not np.isfinite(metrics["loss"])
    assert "skipped" not in metrics


# ------------------------------------------------------------------------------------------ refused


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"accumulate": 3}, r"batch_size=8 must be a multiple of accumulate=3"),
        ({"accumulate": 16}, r"batch_size=8 must be a multiple of accumulate=16"),
        ({"accumulate": -1}, "accumulate must be at least 1, got -1"),
        ({"max_skipped": -1}, "max_skipped must not be negative, got -1"),
        ({"watchdog_minutes": -0.5}, r"watchdog_minutes must not be negative, got -0\.5"),
        ({"ema_decay": 1.0}, r"ema_decay must be in \[0, 1\), got 1\.0"),
    ],
)
def test_settings_that_cannot_be(values, message):
    defaults = {"num_steps": 3, "batch_size": 8, "log_every": 1, "checkpoint_every": 1}
    with pytest.raises(ValueError, match=message):
        loop_lib.check_settings(loop_lib.Settings(**(defaults | {"ema_decay": 0.5} | values)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"pretrain.accumulate": 0},
            r"pretrain\.batch_size=64 must be a multiple of pretrain\.acc",
        ),
        (
            {"pretrain.accumulate": 3},
            r"pretrain\.batch_size=64 .* pretrain\.accumulate=3: micro-batches",
        ),
        ({"pretrain.accumulate": 16}, r"pretrain\.batch_size / pretrain\.accumulate \(16\)=4 .* 8"),
        ({"optim.max_skipped": -1}, "max_skipped must not be negative, got -1"),
        ({"train.watchdog_minutes": -1.0}, "watchdog_minutes must not be negative"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_the_program_refuses_before_any_work(tmp_path, changes, message):
    config = base_config.get_config()
    config.pipeline = "pretrain"
    config.pretrain.batch_size = 64
    config.update_from_flattened_dict(changes)
    with pytest.raises(ValueError, match=message):
        main.check(config, tmp_path)

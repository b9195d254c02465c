"""The training loop: against a plain loop, across devices, across kills, and when it diverges.

Properties of the loop are tested with a stage of two numbers, which compiles quickly; the real
stages run once each, on eight devices, against `state.train_step` on one.
"""

import functools
import itertools
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from marks import slow_except
from ml_collections import ConfigDict

from configs import base as base_config
from fsdfm_jax import io, stages
from fsdfm_jax.flow import process as process_lib
from fsdfm_jax.parallel import mesh as mesh_lib
from fsdfm_jax.training import checkpoint, optim, recipe, state
from fsdfm_jax.training import loop as loop_lib

V, B, L = 11, 8, 6


def make_mesh(data=8, fsdp=1, tensor=1):
    sizes = {"data": data, "fsdp": fsdp, "tensor": tensor, "slices": 1}
    return mesh_lib.make_mesh(ConfigDict(sizes), jax.devices()[: data * fsdp * tensor])


def settings(num_steps, *, keep=9, **values):
    defaults = {"log_every": 1, "checkpoint_every": 100, "ema_decay": 0.5, "batch_size": B}
    retention = checkpoint.Retention(keep=keep)
    return loop_lib.Settings(num_steps=num_steps, retention=retention, **(defaults | values))


UNTIMED = {"time": 0, "timing": {}}  # what differs from run to run

# -------------------------------------------------------------------------- a stage of two numbers


def toy_stage(loss=None):
    """w follows the mean of the batch, plus noise of the step's key."""

    def init_params(key, base):
        return {"w": jnp.zeros(2) if base is None else base["w"] + 0.0}

    def default(params, frozen, key, batch):
        target = batch["x1"].astype(jnp.float32).mean() + jax.random.normal(key)
        value = jnp.mean((params["w"] - target) ** 2)
        return value, {"loss": value, "frozen": frozen.average["w"][0]}

    return stages.Stage("toy", None, init_params, loss or default)


class Stream:
    """Batches that encode their step and record where reading began; `stop_at`: a power cut."""

    def __init__(self, stop_at=None, poison_at=None):
        self.starts, self.read = [], []
        self._stop_at, self._poison_at = stop_at, poison_at

    def __call__(self, start):
        self.starts.append(start)
        for step in itertools.count(start):
            if step == self._stop_at:
                raise KeyboardInterrupt
            self.read.append(step)
            poison = step == self._poison_at
            yield {"x1": np.full((B, L), -1 if poison else 3 * step % 7, np.int32)}


def run(directory, num_steps, *, stage=None, batches=None, **values):
    batches = batches or Stream()
    given = {"name": "toy", "base": None, "key": jax.random.key(0), "mesh": make_mesh()}
    given |= {"needed": None, "turns": None}
    given |= {"optimizer": optax.adam(0.1), "metadata": {"of": "toy"}}
    given |= {name: values.pop(name) for name in list(values) if name in given}
    stage = stage or toy_stage()
    loop_lib.train(
        stage, settings(num_steps, **values), batches=batches, directory=directory, **given
    )
    return batches


def saved(directory, *parts, step=None):
    return checkpoint.restore_part(directory / "checkpoints", parts, step)


def lines(directory):
    return io.read_jsonl(directory / "metrics.jsonl")


def assert_same_bits(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert np.asarray(g).tobytes() == np.asarray(w).tobytes()


EVERYTHING = ("step", "params", "ema", "opt_state")


def test_the_loop_equals_a_plain_loop(tmp_path):
    """Batches in order, a key folded from the step, Adam, the average: all by hand."""
    run(tmp_path, 6)
    _, step_key = jax.random.split(jax.random.key(0))
    optimizer = optax.adam(0.1)
    w = average = jnp.zeros(2)
    opt_state = optimizer.init({"w": w})
    want = []
    for step in range(6):
        noise = jax.random.normal(jax.random.fold_in(step_key, step))
        target = 3 * step % 7 + noise
        grad = {"w": w - target}  # of the mean of two squares
        want.append(
            {
                "loss": float(jnp.mean((w - target) ** 2)),
                "grad_norm": float(jnp.linalg.norm(grad["w"])),
                "frozen": float(average[0]),
            }
        )
        updates, opt_state = optimizer.update(grad, opt_state)
        w = w + updates["w"]
        average = 0.5 * average + 0.5 * w
    got = lines(tmp_path)
    assert [line["step"] for line in got] == [1, 2, 3, 4, 5, 6]
    for line, values in zip(got, want, strict=True):
        assert {name: line[name] for name in values} == pytest.approx(values, rel=1e-5)
    end = saved(tmp_path, *EVERYTHING)
    assert end["step"] == 6
    np.testing.assert_allclose(end["params"]["w"], w, rtol=1e-5)
    np.testing.assert_allclose(end["ema"]["w"], average, rtol=1e-5)
    assert checkpoint.read_metadata(tmp_path / "checkpoints") == {"of": "toy"}


def test_the_average_in_closed_form():
    """ema_n = d^n w_0 + (1 - d) sum_i d^(n-i) w_i, and the teacher is the average before a step."""
    decay, steps = 0.8, 7
    optimizer = optax.sgd(0.3)
    stage = toy_stage()
    step = jax.jit(
        functools.partial(state.train_step, loss=stage.loss, optimizer=optimizer, ema_decay=decay)
    )
    now = state.init_state({"w": jnp.asarray([4.0, -2.0])}, optimizer, ema_decay=decay)
    weights = [np.asarray(now.params["w"], np.float64)]
    stream = Stream()(0)
    for n in range(1, steps + 1):
        before = state.averaged(now)["w"]
        now, metrics = step(now, next(stream), jax.random.key(3))
        assert metrics["frozen"] == before[0]
        weights.append(np.asarray(now.params["w"], np.float64))
        powers = decay ** np.arange(n, -1, -1)
        want = powers @ np.stack(weights) * (1 - decay) + decay ** (n + 1) * weights[0]
        np.testing.assert_allclose(now.ema["w"], want, rtol=1e-5)
        assert state.averaged(now) is now.ema
    assert now.step == steps


def test_without_decay_there_is_no_average(tmp_path):
    now = state.init_state({"w": jnp.ones(2)}, optax.sgd(0.3), ema_decay=0.0)
    assert now.ema is None
    assert state.averaged(now) is now.params
    run(tmp_path, 3, ema_decay=0.0)
    with pytest.raises(checkpoint.NotACheckpoint, match="no part 'ema'"):
        saved(tmp_path, "ema")
    assert lines(tmp_path)[1]["frozen"] == pytest.approx(0.1, rel=1e-5)  # Adam's first step


def test_the_average_has_buffers_of_its_own():
    optimizer = optax.sgd(0.3)
    make = jax.jit(lambda w: state.init_state({"w": w}, optimizer, ema_decay=0.5))
    now = make(jnp.ones(2))
    assert now.params["w"].unsafe_buffer_pointer() != now.ema["w"].unsafe_buffer_pointer()


def test_each_step_donates_the_state_before(tmp_path, monkeypatch):
    states = []

    class Kept(checkpoint.Checkpoints):
        def save(self, step, train_state, metadata, metrics):
            states.append(train_state)

    monkeypatch.setattr(loop_lib, "Checkpoints", Kept)
    run(tmp_path, 3, checkpoint_every=1)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(states[0]))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(states[1]))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(states[2]))


# ----------------------------------------------------------------------------------- kill, resume


@pytest.mark.parametrize("killed_at", [1, 5, 6])
def test_a_killed_run_ends_as_if_it_had_not_been(tmp_path, killed_at):
    values = {"checkpoint_every": 2, "log_every": 2}
    run(tmp_path / "whole", 9, **values)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "killed", 9, batches=Stream(stop_at=killed_at), **values)
    # While step n runs, batch n is being read: the power goes with n steps done.
    kept = killed_at // 2 * 2
    assert (checkpoint.latest_step(tmp_path / "killed" / "checkpoints") or 0) == kept
    again = run(tmp_path / "killed", 9, **values)
    assert again.starts == [kept]
    assert again.read == list(range(kept, 9))
    whole, killed = lines(tmp_path / "whole"), lines(tmp_path / "killed")
    assert [line["step"] for line in killed] == [2, 4, 6, 8, 9]
    for got, want in zip(killed, whole, strict=True):
        assert got | UNTIMED == want | UNTIMED
    for step in (8, 9):
        parts = (saved(tmp_path / name, *EVERYTHING, step=step) for name in ("killed", "whole"))
        assert_same_bits(*parts)


def test_a_second_network_goes_on_from_its_checkpoint(tmp_path):
    """Its weights, its optimiser and its draws, bit for bit."""

    def loss(params, frozen, key, batch):
        target = frozen.partner["w"] + jax.random.normal(key)
        value = jnp.mean((params["w"] - target) ** 2) + 0.0 * batch["x1"].mean()
        return value, {"loss": value}

    auxiliary = stages.Auxiliary(loss, 2, 1.0)
    stage = toy_stage(loss)._replace(auxiliary=auxiliary)
    given = {"stage": stage, "turns": optim.Turns(auxiliary, optax.adam(0.05))}
    given["base"] = {"w": jnp.asarray([1.0, -1.0])}
    run(tmp_path / "whole", 5, **given)
    run(tmp_path / "killed", 3, **given)
    run(tmp_path / "killed", 5, **given)
    parts = (*EVERYTHING, "auxiliary")
    got, want = (saved(tmp_path / name, *parts) for name in ("killed", "whole"))
    assert_same_bits(got, want)
    assert want["auxiliary"]["opt_state"]["0"]["count"] == 10
    for got, want in zip(lines(tmp_path / "killed"), lines(tmp_path / "whole"), strict=True):
        assert got | UNTIMED == want | UNTIMED
        assert {"loss", "auxiliary_loss", "auxiliary_grad_norm"} <= got.keys()


def test_a_finished_run_is_left_alone_and_a_longer_one_goes_on(tmp_path):
    assert run(tmp_path, 3).read == [0, 1, 2]
    before = lines(tmp_path)
    end = saved(tmp_path, *EVERYTHING)
    for num_steps in (3, 2):
        again = run(tmp_path, num_steps)
        assert (again.starts, again.read) == ([], [])
    assert lines(tmp_path) == before
    assert_same_bits(saved(tmp_path, *EVERYTHING), end)
    longer = run(tmp_path, 5)
    assert (longer.starts, longer.read) == ([3], [3, 4])
    assert checkpoint.latest_step(tmp_path / "checkpoints") == 5
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3, 4, 5]
    assert lines(tmp_path)[:3] == before


def test_checkpoints_are_written_on_time_and_the_oldest_go(tmp_path):
    run(tmp_path, 7, checkpoint_every=2, keep=2)
    kept = sorted(int(path.name) for path in (tmp_path / "checkpoints").iterdir())
    assert kept == [6, 7]
    assert int(saved(tmp_path, "step", step=6)["step"]) == 6


def test_a_line_of_metrics_is_the_mean_since_the_last_one(tmp_path):
    run(tmp_path / "each", 7)
    run(tmp_path / "means", 7, log_every=3)
    each = {line["step"]: line["loss"] for line in lines(tmp_path / "each")}
    means = {line["step"]: line["loss"] for line in lines(tmp_path / "means")}
    want = {3: np.mean([each[s] for s in (1, 2, 3)]), 6: np.mean([each[s] for s in (4, 5, 6)])}
    assert means == pytest.approx(want | {7: each[7]}, rel=1e-6)


# --------------------------------------------------------------------------------------- divergence


def poisoned(params, frozen, key, batch):
    """NaN from a batch that holds a negative token."""
    del key
    bad = jnp.any(batch["x1"] < 0)
    value = jnp.mean(params["w"] ** 2) + jnp.where(bad, jnp.nan, 0.0) + 0.0 * frozen.average["w"][0]
    return value, {"loss": value}


def steep(params, frozen, key, batch):
    """A finite loss whose gradient isn't."""
    del frozen, key
    bad = jnp.any(batch["x1"] < 0)
    value = jnp.sum(jnp.sqrt(jnp.where(bad, 0.0, 1.0) * (1.0 + params["w"] ** 2)))
    return value, {"loss": value}


@pytest.mark.parametrize(("loss", "what"), [(poisoned, "loss is nan"), (steep, "grad_norm is nan")])
@pytest.mark.parametrize(("every", "kept"), [(1, 3), (2, 2), (4, 0)])
def test_a_run_stops_where_it_diverges(tmp_path, loss, what, every, kept):
    given = {"stage": toy_stage(loss), "checkpoint_every": every, "name": "distill_2"}
    # The fourth batch is the bad one: step 4, also when a checkpoint is due then.
    with pytest.raises(
        loop_lib.Diverged, match=f"distill_2: .*{what} at step 4.* step {kept} "
    ) as e:
        run(tmp_path, 8, batches=Stream(poison_at=3), **given)
    assert "learning_rate" in str(e.value)
    assert (checkpoint.latest_step(tmp_path / "checkpoints") or 0) == kept
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3, 4]
    assert lines(tmp_path)[-1][what.split()[0]] == "nan"
    if every == 2:  # resumes after the text was repaired
        assert run(tmp_path, 8, **given).starts == [kept]
        assert [line["step"] for line in lines(tmp_path)] == list(range(1, 9))
        assert all(np.isfinite(line["loss"]) for line in lines(tmp_path))


def test_divergence_between_log_lines_is_seen_at_its_step(tmp_path):
    given = {"stage": toy_stage(poisoned), "log_every": 20}
    with pytest.raises(loop_lib.Diverged, match="at step 4"):
        run(tmp_path, 50, batches=Stream(poison_at=3), **given)
    with pytest.raises(loop_lib.Diverged, match="at step 2. Checkpoints up to step 0"):
        run(tmp_path / "last", 2, batches=Stream(poison_at=1), **given)
    assert checkpoint.latest_step(tmp_path / "last" / "checkpoints") is None


@pytest.mark.parametrize(
    "field", ["num_steps", "log_every", "checkpoint_every", "batch_size", "accumulate"]
)
def test_settings_below_one_are_refused(tmp_path, field):
    values = {"num_steps": 3} | {field: 0}
    with pytest.raises(ValueError, match=f"{field} must be at least 1, got 0"):
        run(tmp_path, **values)
    assert list(tmp_path.iterdir()) == []


# --------------------------------------------------------------------------------- the real stages


def make_config():
    config = base_config.get_config()
    model = config.model
    model.width, model.num_blocks, model.num_heads, model.cond_width = 8, 2, 2, 4
    model.mlp_ratio = 2
    # Adam divides by the size of the gradient: below eps, where it is rounding, it no longer does.
    config.optim.eps = 1e-3
    for name in stages.NAMES:
        config[name].learning_rate, config[name].num_steps = 1e-2, 100
        if name in stages.FEW_STEP:
            config[name].max_log2_steps = 4
    config.distill.tau = 0.25
    config.refine.max_log2_steps = 1  # rows of one step and of two
    return config


def make_stage(name):
    """(stage, what trains it) of a name; "guided" is `distill` with guidance."""
    config = make_config()
    if name == "guided":
        name = "distill"
        config.distill.guidance, config.distill.guide = 1.0, "short"
    process = process_lib.make_process(**config.path, num_tokens=V, eos_id=2)
    stage = stages.make_stage(name, config, process)
    optimizer = optim.make_optimizer(config.optim, config[name])
    return stage, optimizer, optim.make_turns(config.optim, config[name], stage)


@functools.cache
def base_params():
    """Not initial values: with their zeros all stages would give the same output."""
    stage, _, _ = make_stage("pretrain")
    rng = np.random.default_rng(0)
    fresh = jax.eval_shape(stage.init_params, jax.random.key(0), None)
    noise = lambda leaf: 0.5 * rng.standard_normal(leaf.shape).astype(np.float32)
    return jax.tree.map(noise, fresh)


def make_needed(stage):
    """Weights of base models, another one for each that a stage names."""
    scaled = lambda scale: jax.tree.map(lambda leaf: scale * leaf, base_params())
    return {key: scaled(0.8**number) for number, key in enumerate(stage.needs)}


def text(start):
    for step in itertools.count(start):
        rng = np.random.default_rng([7, step])
        yield {"x1": rng.integers(0, V, (B, L)).astype(np.int32)}


DECAY = 0.9


def train_on_eight(directory, name, num_steps, **values):
    stage, optimizer, turns = make_stage(name)
    # As `workdir.load_weights` gives them: committed to one device.
    base = jax.device_put(base_params(), jax.sharding.SingleDeviceSharding(jax.devices()[0]))
    needed = make_needed(stage)
    run(
        directory,
        num_steps,
        stage=stage,
        needed=jax.device_put(needed, mesh_lib.state_shardings(make_mesh(), needed)),
        batches=text,
        base=base,
        optimizer=optimizer,
        turns=turns,
        ema_decay=DECAY,
        **values,
    )


@pytest.fixture(scope="module")
def distilled(tmp_path_factory):
    directory = tmp_path_factory.mktemp("distill")
    train_on_eight(directory, "distill", 4, checkpoint_every=1)
    return directory


# Each compiles two programs; the loss of the slow ones is part of the others' or hardly random.
CASES = ("autoregressive", "pretrain", "step_aware", "distill", "guided", "refine")


@pytest.mark.parametrize("name", slow_except(["distill"], CASES))
def test_eight_devices_equal_a_plain_loop_on_one(tmp_path, request, name):
    if name == "distill":
        directory, steps = request.getfixturevalue("distilled"), 4
    else:
        directory, steps = tmp_path, 3
        if name == "autoregressive":
            # has no time embedding to start from
            stage, optimizer, _ = make_stage(name)
            given = {"stage": stage, "optimizer": optimizer, "ema_decay": DECAY}
            run(directory, steps, batches=text, **given)
        else:
            train_on_eight(directory, name, steps)
    stage, optimizer, turns = make_stage(name)
    init_key, step_key = jax.random.split(jax.random.key(0))
    base = None if name == "autoregressive" else base_params()

    def init(key, base):
        params = stage.init_params(key, base)
        return state.init_state(params, optimizer, ema_decay=DECAY, turns=turns)

    one = jax.jit(init)(init_key, base)
    step = functools.partial(
        state.train_step, loss=stage.loss, optimizer=optimizer, ema_decay=DECAY, turns=turns
    )
    step = jax.jit(step)
    stream = text(0)
    want = []
    for _ in range(steps):
        one, metrics = step(one, next(stream), step_key, make_needed(stage))
        want.append(metrics)
    for line, metrics in zip(lines(directory), want, strict=True):
        for key, value in metrics.items():
            np.testing.assert_allclose(line[key], value, rtol=1e-5, err_msg=key)
    pairs = [(saved(directory, part)[part], getattr(one, part)) for part in ("params", "ema")]
    if turns is not None:
        pairs.append((saved(directory, "auxiliary")["auxiliary"]["params"], one.auxiliary.params))
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
    for got, values in pairs:
        jax.tree.map(close, got, values)


def test_golden_distillation_steps(distilled):
    """Recorded once on a CPU; a change of these numbers changes training."""
    got = [
        (line["path_loss"], line["distillation_loss"], line["loss"]) for line in lines(distilled)
    ]
    np.testing.assert_allclose(got, GOLDEN, rtol=1e-4)


GOLDEN = [
    (7.055466, 1.076995, 3.468384),
    (5.886205, 0.810028, 2.840499),
    (53.573265, 0.640621, 21.813679),
    (5.520270, 0.654532, 2.600827),
]


def test_four_steps_are_two_and_two(tmp_path, distilled):
    """Bit for bit, through a checkpoint, for a real stage with dropout, teacher and average."""
    shutil.copytree(distilled, tmp_path / "run")
    for step in ("3", "4"):  # as it was after two steps; the lines of metrics are the loop's to cut
        shutil.rmtree(tmp_path / "run" / "checkpoints" / step)
    assert saved(tmp_path / "run", "step")["step"] == 2
    train_on_eight(tmp_path / "run", "distill", 4)
    got, want = (saved(folder, *EVERYTHING) for folder in (tmp_path / "run", distilled))
    assert got["step"] == 4
    assert_same_bits(got, want)
    assert [line["step"] for line in lines(tmp_path / "run")] == [1, 2, 3, 4]
    for got, want in zip(lines(tmp_path / "run"), lines(distilled), strict=True):
        assert got | UNTIMED == want | UNTIMED


def test_no_checkpoint_of_a_stage_that_cannot_start(tmp_path):
    stage, optimizer, _ = make_stage("distill")
    batches = Stream()
    with pytest.raises(ValueError, match="needs trained base weights"):
        run(tmp_path, 4, stage=stage, optimizer=optimizer, batches=batches)
    assert checkpoint.latest_step(tmp_path / "checkpoints") is None
    assert batches.starts == []
    assert not (tmp_path / "metrics.jsonl").exists()


def test_the_loss_goes_down_on_text_that_can_be_learnt(tmp_path):
    config = make_config()
    config.pretrain.loss = "cross_entropy"
    process = process_lib.make_process(**config.path, num_tokens=V, eos_id=2)
    stage = stages.make_stage("pretrain", config, process)
    optimizer = optim.make_optimizer(config.optim, config.pretrain)
    constant = lambda start: ({"x1": np.full((B, L), 3, np.int32)} for _ in itertools.count())
    run(tmp_path, 50, stage=stage, optimizer=optimizer, batches=constant, log_every=10)
    got = [line["loss"] for line in lines(tmp_path)]
    assert got[0] > 1.5  # ln 11 = 2.4 at the start
    assert got[-1] < 0.3
    assert got == sorted(got, reverse=True)


def test_an_older_checkpoint_of_another_recipe_is_not_resumed(tmp_path):
    """The newest has this recipe and is damaged; the previous one has another recipe."""
    other = {"format": recipe.FORMAT, "stage": "toy", "recipe": {"toy": {"num_steps": 2}}}
    ours = other | {"recipe": {"toy": {"num_steps": 4}}}
    run(tmp_path, 2, metadata=other)
    run(tmp_path, 4, metadata=ours | {"recipe": other["recipe"]})
    folder = tmp_path / "checkpoints"
    record = checkpoint.read_record(folder, 4)
    assert record.metadata["recipe"] == other["recipe"]
    for path in (folder / "4").rglob("*"):
        if path.is_file() and path.stat().st_size:
            path.write_bytes(bytes(path.stat().st_size))
    with pytest.raises(ValueError, match=r"another configuration \(toy.num_steps: 2 before, 4 now"):
        run(tmp_path, 6, metadata=ours)

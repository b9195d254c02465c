"""The Python interface: load, save and export models, and train on arrays of tokens.

`import fsdfm_jax as fs` provides these functions as `fs.load`, `fs.save` etc.
"""

import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from fsdfm_jax import cli, schema, stages
from fsdfm_jax.convert import formats, hub
from fsdfm_jax.convert.formats import Target
from fsdfm_jax.data.tokenizer import Tokenizer
from fsdfm_jax.flow.process import make_process
from fsdfm_jax.flow.sampling import Sampling
from fsdfm_jax.inference import bundle as bundle_lib
from fsdfm_jax.inference.bundle import Bundle
from fsdfm_jax.network.model import Params
from fsdfm_jax.stages.base import Stage
from fsdfm_jax.training import optim, state
from fsdfm_jax.training.metrics import Progress


def load(
    path: str | os.PathLike | None = None, *, revision: str | None = None, **options: Any
) -> Bundle:
    """Open a model of any format; parameters are read on demand.

    >>> import fsdfm_jax as fs
    >>> model = fs.load()
    >>> model.block_length
    128

    Args:
      path: a file or folder: official .pth, safetensors, a working directory, an exported sampler,
        a folder of `save_pretrained`; or "user/name" on the Hugging Face Hub, if there is no local
        folder "user" (`pip install "fsdfm_jax[hub]"`). None is the bundled few-step model, "base"
        the bundled base model (a folder of that name is "./base").
      revision: branch, tag or commit of a model on the Hub.
      **options: of `formats.open_bundle`: which, num_heads, tokenizer, stage, source.

    Returns:
      The model: network, parameters, tokenizer, noising process and provenance.

    Raises:
      ValueError: for a file that is damaged, malicious or of an unknown format.
      FileNotFoundError: `path` doesn't exist.
      OSError: the download from the Hub fails.
    """
    if path is None:
        path = formats.BUNDLED
    elif path == "base":
        path = formats.BUNDLED_BASE
    elif hub.is_name(path) and not pathlib.Path(path).parent.is_dir():
        path = hub.download(str(path), revision)
    elif revision is not None:
        raise ValueError(f"revision={revision!r} needs a model on the Hub; {path} isn't one.")
    return formats.open_bundle(path, **options)


def save(
    model: Bundle, path: str | os.PathLike, *, overwrite: bool = False, **options: Any
) -> None:
    """Write a model, atomically.

    >>> import fsdfm_jax as fs, tempfile
    >>> model = fs.load()
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     fs.save(model, f"{folder}/model.safetensors", dtype="bfloat16")
    ...     fs.load(f"{folder}/model.safetensors").num_params() == model.num_params()
    True

    Args:
      model: from `load` or `train`.
      path: its suffix (.pth, .safetensors) or `to` selects the format.
      overwrite: whether to replace a model of the same format.
      **options: of `formats.Target`: to ("safetensors" or "orbax" for a folder), layout, dtype.

    Raises:
      ValueError: if the format doesn't support this network, or the target exists.
    """
    target = Target(pathlib.Path(path).expanduser(), **options)
    formats.write(model, target, overwrite=overwrite)


def save_pretrained(
    model: Bundle,
    folder: str | os.PathLike,
    *,
    dtype: str = "float32",
    report: str | os.PathLike | None = None,
    overwrite: bool = False,
) -> None:
    """Write a model in the layout of the Hugging Face Hub, atomically.

    >>> import fsdfm_jax as fs, tempfile
    >>> model = fs.load()
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     fs.save_pretrained(model, f"{folder}/tiny")
    ...     fs.load(f"{folder}/tiny").num_params() == model.num_params()
    True

    The folder has weights, tokenizer, configuration, sampler, a model card and the network in
    PyTorch: `AutoModelForMaskedLM.from_pretrained(folder, trust_remote_code=True)` computes the
    same logits. `hf upload user/name FOLDER` publishes it.

    Args:
      model: from `load` or `train`.
      folder: must not exist, unless `overwrite`.
      dtype: of the weights in the file, "float32" | "bfloat16".
      report: folder of a report with figures of these weights for the card.
      overwrite: whether to replace a folder in this layout.

    Raises:
      ValueError: if the folder exists, or the report doesn't.
    """
    place = None if report is None else pathlib.Path(report).expanduser()
    target = Target(pathlib.Path(folder).expanduser(), "hub", dtype=dtype, report=place)
    formats.write(model, target, overwrite=overwrite)


def export(
    model: Bundle,
    folder: str | os.PathLike,
    *,
    steps: int | Sequence[int] = (),
    length: int | None = None,
    sampling: Sampling | None = None,
    overwrite: bool = False,
) -> None:
    """Export a few-step sampler as a folder with a `run.py` that doesn't need this package.

    >>> import fsdfm_jax as fs, tempfile
    >>> model = fs.load()
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     fs.export(model, f"{folder}/sampler", steps=1)
    ...     fs.load(f"{folder}/sampler").num_params() == model.num_params()
    True

    Args:
      model: from `load` or `train`; not autoregressive.
      folder: must not exist, unless `overwrite`.
      steps: numbers of network calls, one program each; empty for the steps of `sampling`.
      length: tokens per sample; None for the model's training block length.
      sampling: settings; None for the model's default.
      overwrite: whether to replace an exported sampler.

    Raises:
      ValueError: for a model that can't be exported, or if the folder exists.
    """
    steps = (steps,) if isinstance(steps, int) else tuple(steps)
    target = Target(pathlib.Path(folder).expanduser(), "sampler")
    formats.write(
        model,
        Target(target.path, "sampler", steps=steps, length=length, sampling=sampling),
        overwrite=overwrite,
    )


def train(
    tokens_NL: np.ndarray,
    *,
    stage: str = "pretrain",
    base: Bundle | None = None,
    tokenizer: Tokenizer | None = None,
    vocab_size: int | None = None,
    eos_id: int = 0,
    model: Mapping[str, Any] | None = None,
    path: Mapping[str, Any] | None = None,
    num_steps: int = 1000,
    batch_size: int = 64,
    learning_rate: float = 1e-3,
    ema_decay: float = 0.999,
    seed: int = 0,
    **options: Any,
) -> Bundle:
    """Train one stage on blocks of tokens, on this process's first device.

    For long runs use the program `fsdfm_jax.main`, which adds checkpoints, resuming and sharding;
    the stages and the optimiser step are the same.

    >>> import fsdfm_jax as fs, functools, jax, numpy as np
    >>> text_NL = np.tile(np.arange(8), (64, 2))
    >>> network = {"width": 16, "num_blocks": 1, "num_heads": 2, "cond_width": 8}
    >>> how = {"num_steps": 20, "batch_size": 16, "learning_rate": 3e-3}
    >>> base = fs.train(text_NL, model=network, loss="cross_entropy", **how)
    >>> model = fs.train(text_NL, stage="distill", base=base, **how)
    >>> process, (noise_key, key) = model.process(), jax.random.split(jax.random.key(0))
    >>> denoise = functools.partial(fs.predict, model.params(), model.model)
    >>> jump, x0_BL = process.make_jump(fs.CUMULATIVE), process.source.sample(noise_key, (4, 16))
    >>> fs.sample(key, denoise, jump, process.finalize, x0_BL, fs.uniform_grid(2)).shape
    (4, 16)

    Args:
      tokens_NL: int [N, L], blocks of token ids.
      stage: "pretrain" | "autoregressive", or a few-step stage that needs `base`: "step_aware" |
        "distill" | "refine".
      base: the model to start from; provides network, process and tokenizer.
      tokenizer: of the tokens, or None.
      vocab_size: number of ids; None for the tokenizer's, or the largest id plus one.
      eos_id: token between documents, if there is no tokenizer.
      model: values of `config.model` (width, num_blocks, num_heads, positions, ..), without `base`.
      path: values of `config.path` (schedule, power, source, revealed), without `base`.
      num_steps, batch_size, learning_rate, ema_decay: of the training.
      seed: for all randomness: the same arguments give the same parameters.
      **options: other values of the stage's section in configs/base.py (warmup_steps, loss,
        teacher_rule, ..). For keys that name base models (refine's `teacher`, distill's `guide`)
        give the models; `teacher` defaults to `base` if that is a base model.

    Returns:
      The trained model, with the EMA of the weights unless `ema_decay` is 0.

    Raises:
      ValueError: for tokens that aren't blocks of ids, a few-step stage without `base`, or an
        invalid value.
      FloatingPointError: the training diverged.
    """
    tokens_NL = _check_tokens(tokens_NL)
    config = cli.base_config()
    _check_stage(stage, base, options)
    networks = {key: value for key, value in options.items() if isinstance(value, Bundle)}
    options |= dict.fromkeys(networks, "given")
    given = {"num_steps": num_steps, "batch_size": batch_size, "learning_rate": learning_rate}
    cli.update(config, {"data": {"block_length": tokens_NL.shape[1]}})
    cli.update(config, {stage: given | {"ema_decay": ema_decay} | options})
    if base is not None:
        if model or path or tokenizer:
            raise ValueError("base provides network, path and tokenizer; omit these.")
        tokenizer, vocab_size = base.tokenizer, base.num_tokens
        _take_over(config, base)
        base.model.check_length(tokens_NL.shape[1])
    else:
        cli.update(config, {"model": model or {}, "path": path or {}})
    if vocab_size is None:
        vocab_size = int(tokens_NL.max()) + 1 if tokenizer is None else tokenizer.vocab_size
    if tokens_NL.max() >= vocab_size:
        raise ValueError(f"tokens_NL has the id {tokens_NL.max()}, but vocab_size={vocab_size}.")
    eos_id = eos_id if tokenizer is None else tokenizer.eos_id
    process = make_process(**config.path, num_tokens=vocab_size, eos_id=eos_id)
    schema.check(config)
    made = stages.make_stage(stage, config, process)
    _check_parts(batch_size, config[stage].accumulate)
    needed = {key: _base_model(key, networks, base) for key in made.needs}
    params = None if base is None else _on_device(base)
    weights = _fit(made, config, tokens_NL, params, needed, seed)
    said = {"run": stage, "stage": stage, "step": num_steps, "ema_decay": ema_decay}
    said |= {"weights": "ema" if ema_decay else "student", "config": config.to_dict()}
    said |= {"tokenizer": None if tokenizer is None else tokenizer.fingerprint}
    return bundle_lib.from_params(
        jax.tree.map(np.asarray, weights),
        made.model,
        path=dict(config.path),
        tokenizer=tokenizer,
        block_length=tokens_NL.shape[1],
        provenance=said,
    )


def _on_device(bundle: Bundle) -> Params:
    return jax.tree.map(jax.numpy.asarray, bundle.device_params())


# Fields of a network that must be equal for networks trained together.
_SHAPE = ("width", "num_blocks", "num_heads", "cond_width", "mlp_ratio")
_KEPT = (*_SHAPE, "positions", "given", "dtype")


def _base_model(key: str, networks: Mapping[str, Bundle], base: Bundle | None) -> Params:
    """Weights of a base model that a stage reads: the one given with this key, or `base`."""
    bundle = networks.get(key, None if key == "guide" else base)
    if bundle is None or bundle.model.causal or bundle.model.conditioning != "none":
        raise ValueError(
            f"{key} must be a base model, of stage 'pretrain'; give it as {key}= if base isn't one."
        )
    kept = (*_KEPT, "vocab_size")
    fits = base is None or all(getattr(bundle.model, x) == getattr(base.model, x) for x in kept)
    if base is not None and not (fits and dict(bundle.path) == dict(base.path)):
        raise ValueError(f"{key} must have the same network and path as base.")
    return _on_device(bundle)


def _take_over(config: ConfigDict, base: Bundle) -> None:
    """Set the network and the path to those of a model."""
    cli.update(config, {"model": {name: getattr(base.model, name) for name in _KEPT}})
    if base.model.conditioning != "none":
        cli.update(config, {"model": {"conditioning": base.model.conditioning}})
    cli.update(config, {"path": dict(base.path)})
    if base.model.num_positions:
        cli.update(config, {"data": {"block_length": base.model.num_positions}})


def _check_stage(stage: str, base: Bundle | None, options: Mapping[str, Any]) -> None:
    if stage not in stages.NAMES:
        raise ValueError(f"Unknown stage {stage!r}; expected one of {', '.join(stages.NAMES)}.")
    if base is None and stage in stages.FEW_STEP:
        raise ValueError(f"Stage {stage!r} needs a trained model; give it as base=.")
    if options.get("init_from"):
        raise ValueError("init_from is for runs of a working directory; give a model as base=.")


def _check_parts(batch_size: int, accumulate: int) -> None:
    if batch_size % accumulate:
        raise ValueError(f"batch_size={batch_size} must be a multiple of accumulate={accumulate}.")


def _check_tokens(tokens_NL: np.ndarray) -> np.ndarray:
    tokens_NL = np.asarray(tokens_NL)
    whole = np.issubdtype(tokens_NL.dtype, np.integer)
    if tokens_NL.ndim != 2 or not tokens_NL.size or not whole or tokens_NL.min() < 0:
        raise ValueError(
            "tokens_NL must be non-negative integer ids [N, L], blocks of equal length; got "
            f"{tokens_NL.dtype} of shape {tokens_NL.shape}."
        )
    return tokens_NL.astype(np.int32)


def _fit(
    made: Stage,
    config: ConfigDict,
    tokens_NL: np.ndarray,
    params: Params | None,
    needed: dict[str, Params],
    seed: int,
) -> Params:
    """Train, and return the weights after the last step."""
    own = config[made.name]
    optimizer = optim.make_optimizer(config.optim, own)
    turns = optim.make_turns(config.optim, own, made)
    init_key, step_key = jax.random.split(jax.random.key(seed), 3)[:2]
    batches = _batches(own, tokens_NL, seed)

    @jax.jit
    def init(key, params):
        params = made.init_params(key, params)
        return state.init_state(params, optimizer, ema_decay=own.ema_decay, turns=turns)

    @jax.jit
    def step(train_state, batch, needed):
        return state.train_step(
            train_state,
            batch,
            step_key,
            needed,
            loss=made.loss,
            optimizer=optimizer,
            ema_decay=own.ema_decay,
            accumulate=own.accumulate,
            turns=turns,
        )

    train_state = init(init_key, params)
    with Progress(f"training {made.name}", total=own.num_steps) as progress:
        for _ in range(own.num_steps):
            train_state, metrics = step(train_state, next(batches), needed)
            progress.advance()
    if not np.isfinite(metrics["loss"]):
        raise FloatingPointError(
            f"The loss of {made.name} is {float(metrics['loss'])}; lower the learning rate."
        )
    return state.averaged(train_state)


def _batches(own: ConfigDict, tokens_NL: np.ndarray, seed: int) -> Iterator[dict[str, np.ndarray]]:
    """Yield batches of rows in random order, each row once per epoch."""
    generator, left = np.random.default_rng(seed), np.zeros((0,), np.int64)
    while True:
        while len(left) < own.batch_size:
            left = np.concatenate([left, generator.permutation(len(tokens_NL))])
        rows, left = left[: own.batch_size], left[own.batch_size :]
        yield {"x1": tokens_NL[rows]}

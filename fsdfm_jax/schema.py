"""Types, ranges and choices of all configuration keys, checked before anything starts.

`KEYS` and `SWEEP_KEYS` declare every key of configs/base.py and configs/sweep.py. A new key needs
one line here; undeclared keys are errors. Conditions on several keys (warm-up within a stage, heads
within a width) are checked where they are used.

    check(config)     raises a ValueError that names every bad key
"""

import difflib
import re
import struct
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from ml_collections import ConfigDict

_SHOWN = 4  # problems listed in a message


# ------------------------------------------------------------------------------------------- kinds
class Whole(NamedTuple):
    """An integer in an interval, "[1, 1e9]", or one of a few other values."""

    interval: str
    besides: tuple[int, ...] = ()

    def problem(self, value: Any) -> str:
        """Describe the expected value; "" if the value is good."""
        whole = isinstance(value, int) and not isinstance(value, bool)
        if whole and (value in self.besides or _inside(value, self.interval)):
            return ""
        others = "".join(f" or {other}" for other in self.besides)
        return f"an integer in {self.interval}{others}"


class Number(NamedTuple):
    """A finite number in an interval, "[0, 1)", also after rounding to float32."""

    interval: str
    optional: bool = False  # None means 0

    def problem(self, value: Any) -> str:
        """Describe the expected value; "" if the value is good."""
        if value is None and self.optional:
            return ""
        if isinstance(value, int | float) and not isinstance(value, bool):
            try:
                rounded = struct.unpack("f", struct.pack("f", value))[0]
            except OverflowError:
                rounded = float("inf")
            if _inside(value, self.interval) and _inside(rounded, self.interval):
                return ""
        return f"a finite number in {self.interval}{' or None' * self.optional}"


class Choice(NamedTuple):
    """One of a few names."""

    names: tuple[str, ...]

    def problem(self, value: Any) -> str:
        """Describe the expected value; "" if the value is good."""
        if isinstance(value, str) and value in self.names:
            return ""
        near = difflib.get_close_matches(str(value), self.names, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        return f"one of {', '.join(self.names)}{hint}"


class Text(NamedTuple):
    """Text that matches a pattern; the word "None" is never valid."""

    pattern: str = r".+"
    what: str = "text"

    def problem(self, value: Any) -> str:
        """Describe the expected value; "" if the value is good."""
        sound = isinstance(value, str) and value != "None" and "\0" not in value
        if sound and re.fullmatch(self.pattern, value, re.DOTALL):
            return ""
        return self.what + (", '' for none" if re.fullmatch(self.pattern, "") else "")


class Several(NamedTuple):
    """A tuple of values of one kind."""

    kind: Any
    least: int = 1

    def problem(self, value: Any) -> str:
        """Describe the expected value; "" if the value is good."""
        if isinstance(value, tuple | list) and len(value) >= self.least:
            problems = [problem for item in value if (problem := self.kind.problem(item))]
            return f"each {problems[0]}" if problems else ""
        return "a tuple of at least one value" if self.least else "a tuple"


Kind = Whole | Number | Choice | Text | Several


def _inside(value: float, interval: str) -> bool:
    low, high = (float(end) for end in interval[1:-1].split(","))
    above = value > low or (value == low and interval[0] == "[")
    below = value < high or (value == high and interval[-1] == "]")
    return above and below


# -------------------------------------------------------------------------------------------- keys
_MANY = Whole("[1, 1e9]")
_MANY_OR_NONE = Whole("[0, 1e9]")
_FREE = Text("(?s:.*)")
_JUMP = Choice(("cumulative", "euler", "mixture", "dispersed"))
_GRID = Text(
    r"uniform|cosine|(power|geometric):[0-9.eE+-]+",
    "uniform, cosine, power:R with a number R above 0, or geometric:E with E between 0 and 1",
)
_STEPS = Whole("[1, 1048576]")
_SEED = Whole("[0, 4294967295]")
_WEIGHTS = Choice(("ema", "student"))
_SHARE = "[0, 1]"
_LOSSES = ("path", "cross_entropy")

_SAMPLING: dict[str, Kind] = {
    "steps": _STEPS,
    "jump": _JUMP,
    "grid": _GRID,
    "temperature": Number("[0, 1e6]"),
    "cooling": Number("[0, 1)"),
    "top_p": Number("(0, 1]"),
    "look_ahead": Number(_SHARE),
}
_STAGE: dict[str, Kind] = {
    "num_steps": _MANY,
    "batch_size": Whole("[1, 1e7]"),
    "accumulate": Whole("[1, 1e6]"),
    "learning_rate": Number("(0, 10]"),
    "warmup_steps": _MANY_OR_NONE,
    "decay_steps": _MANY_OR_NONE,
    "final_lr_fraction": Number(_SHARE),
    "ema_decay": Number("[0, 1)"),
    "init_from": _FREE,
}
_BUDGETS: dict[str, Kind] = {
    "max_log2_steps": Whole("[0, 20]"),  # the network can't distinguish finer widths
    "width_weights": Choice(("log_uniform", "official")),
    "time_eps": Number("[0, 1)"),
    "loss": Choice(_LOSSES),
    "rate": Choice(("cumulative", "instantaneous")),
    "rate_floor": Number("(0, 1)"),
}
_TEACHER: dict[str, Kind] = {
    **_BUDGETS,
    "tau": Number("(0, 1e6]"),
    "teacher_rule": Choice(("heun", "rk4")),
    "teacher_jump": _JUMP,
    "teacher_end": Choice(("posterior_draw", "literal")),
    "divergence": Choice(("forward_kl", "jsd")),
    "temperature": Number("(0, 1e6]"),
}
_DATA: dict[str, Kind] = {
    "corpus": _FREE,
    "text_field": Text(),
    "documents": Choice(("record", "wikitext")),
    "tokenizer": Text(),
    "vocab_size": Whole("[257, 16777216]"),
    "block_length": Whole("[1, 1048576]"),
    "holdout": Number("[0, 1)"),
    "validation": _FREE,
    "mixture": _FREE,
    "directory": _FREE,
}
_PATH: dict[str, Kind] = {
    "schedule": Choice(("polynomial", "cosine")),
    "power": Number("(0, 1e3]"),
    "source": Choice(("uniform", "mask")),
    "revealed": Choice(("stay", "jump")),
}
_MODEL: dict[str, Kind] = {
    "width": Whole("[1, 131072]"),
    "num_blocks": Whole("[1, 10000]"),
    "num_heads": Whole("[1, 65536]"),
    "cond_width": Whole("[1, 131072]"),
    "mlp_ratio": Whole("[1, 1024]"),
    "dropout": Number("[0, 1)"),
    "conditioning": Choice(("none", "additive", "official")),
    "positions": Choice(("rotary", "learned")),
    "given": Choice(("unmarked", "marked")),
    "dtype": Choice(("float32", "bfloat16")),
    "attention": Choice(("auto", "manual", "blocked", "xla", "cudnn")),
    "remat": Choice(("none", "full", "dots")),
    "logits_mib": Whole("[0, 1e6]"),
}
_OPTIM: dict[str, Kind] = {
    "name": Choice(("adamw", "muon")),
    "muon_rms": Number("(0, 1e3]"),
    "b1": Number("[0, 1)"),
    "b2": Number("[0, 1)"),
    "eps": Number("(0, 1]"),
    "weight_decay": Number("[0, 10]"),
    "clip_norm": Number("[0, 1e6]", optional=True),
    "moment_dtype": Choice(("float32", "bfloat16")),
    "max_skipped": _MANY_OR_NONE,
}
_AXIS = Whole("[1, 1e6]", besides=(-1,))
_MESH: dict[str, Kind] = {
    "data": _AXIS,
    "fsdp": _AXIS,
    "tensor": _AXIS,
    "slices": Whole("[1, 1e6]"),
}
_TRAIN: dict[str, Kind] = {
    "log_every": _MANY,
    "checkpoint_every": _MANY,
    "keep_checkpoints": _MANY,
    "keep_every": _MANY_OR_NONE,
    "keep_best": _MANY_OR_NONE,
    "best_metric": Text(),
    "wandb": Text(r"[\w.-]{0,128}", "the name of a project (letters, digits, _ . -)"),
    "watchdog_minutes": Number("[0, 1e6]"),
}
_EVAL: dict[str, Kind] = {
    "num_samples": Whole("[1, 1e7]"),
    "batch_size": Whole("[1, 1e6]"),
    "steps": Several(_STEPS, least=0),
    "many_steps": _STEPS,
    "jumps": Several(_JUMP),
    "memories": Several(Choice(("cache", "none")), least=0),
    **{f"sampling.{name}": kind for name, kind in _SAMPLING.items()},
    "weights": _WEIGHTS,
    "seed": _SEED,
    "task": Text(),
    "controls": Several(
        Choice(("unigram", "ngram", "shuffled", "repeated", "one", "few", "cold")), least=0
    ),
    "models": _FREE,
    "judges": _FREE,
    "law": _FREE,
    "watched": Whole("[0, 1e7]"),
    "bound_samples": Whole("[0, 1e7]"),
    "bound_times": Whole("[2, 1e9]"),
    "resamples": Whole("[2, 1e7]"),
}
# Empty axes take the value of the base sampler.
_AXES: dict[str, Kind] = {
    "models": Several(Text(), least=0),
    "steps": Several(_STEPS),
    "jumps": Several(_JUMP, least=0),
    "grids": Several(_GRID, least=0),
    "temperatures": Several(_SAMPLING["temperature"]),
    "top_ps": Several(_SAMPLING["top_p"], least=0),
    "coolings": Several(_SAMPLING["cooling"], least=0),
    "look_aheads": Several(_SAMPLING["look_ahead"], least=0),
    "weights": Several(_WEIGHTS),
    "seeds": Several(_SEED),
}
_SECTIONS: dict[str, dict[str, Kind]] = {
    "data": _DATA,
    "path": _PATH,
    "model": _MODEL,
    "optim": _OPTIM,
    "autoregressive": _STAGE,
    "pretrain": _STAGE
    | {
        "time_eps": Number("(0, 1)"),
        "time_power": Number("[1, 100]"),
        "loss": Choice((*_LOSSES, "rate_cross_entropy")),
        "rate_floor": Number("(0, 1)"),
    },
    "step_aware": _STAGE | _BUDGETS,
    "distill": _STAGE | _TEACHER | {"guidance": Number("[0, 100]"), "guide": _FREE},
    "refine": _STAGE
    | {
        "max_log2_steps": Whole("[0, 20]"),
        "grid": _GRID,
        "teacher": Text(),
        "noise": Several(Number("(0, 1)"), least=2),
        "auxiliary_updates": Whole("[1, 1000]"),
        "auxiliary_rate": Number("(0, 1e3]"),
    },
    "mesh": _MESH,
    "train": _TRAIN,
    "eval": _EVAL,
}


def _dotted(sections: Mapping[str, Mapping[str, Kind]]) -> dict[str, Kind]:
    return {f"{name}.{key}": kind for name, own in sections.items() for key, kind in own.items()}


# Keys of configs/base.py.
KEYS: dict[str, Kind] = {"seed": _SEED, "pipeline": Text(), **_dotted(_SECTIONS)}
# Keys of configs/sweep.py; its name is also that of a folder.
SWEEP_KEYS: dict[str, Kind] = {
    "name": Text(r"(?!\.+$)[\w.-]+", "a folder name of letters, digits, '_', '-' and '.'"),
    **_dotted({"axes": _AXES, "eval": _EVAL}),
}


# ----------------------------------------------------------------------------------------- checking
def check(config: ConfigDict, declared: Mapping[str, Kind] | None = None) -> None:
    """Check that a configuration has all keys, no unknown ones, and only valid values.

    Args:
      config: the whole configuration.
      declared: key -> kind; None for `SWEEP_KEYS` if the config has axes, otherwise `KEYS`.

    Raises:
      ValueError: in one line, with the bad keys, the expected and the actual values.
    """
    if declared is None:
        declared = SWEEP_KEYS if "axes" in config else KEYS
    problems = list(_problems(config, declared))
    if problems:
        more = [f"and {len(problems) - _SHOWN} more"] if problems[_SHOWN:] else []
        raise ValueError("; ".join(problems[:_SHOWN] + more))


def check_section(name: str, section: Mapping[str, Any]) -> None:
    """`check` one section by name, for example "eval"."""
    own = {key: kind for key, kind in (KEYS | SWEEP_KEYS).items() if key.startswith(f"{name}.")}
    check(ConfigDict({name: section}), own)


def _problems(config: ConfigDict, declared: Mapping[str, Kind]) -> Iterator[str]:
    found = dict(_leaves(config))
    sections = {key[: end.start()] for key in declared for end in re.finditer(r"\.", key)}
    replaced = [key for key in found if key in sections]
    for key in replaced:
        yield (
            f"config.{key} is a section but was replaced by a {type(found[key]).__name__}; set its "
            f"keys one by one, config.{key}.KEY = .."
        )
    for key in sorted(found.keys() - declared.keys() - set(replaced)):
        yield unknown_key(key, list(declared)).rstrip(".")
    missing = [
        f"config.{key}"
        for key in declared
        if key not in found and not any(key.startswith(f"{section}.") for section in replaced)
    ]
    if missing:
        more = f" and {len(missing) - _SHOWN} more" * (len(missing) > _SHOWN)
        yield (
            f"missing: {', '.join(missing[:_SHOWN])}{more} (deleted, or a section replaced); start "
            "from get_config() of configs/base.py and set keys one by one"
        )
    for key, value in found.items():
        if key in declared and (expected := declared[key].problem(value)):
            yield f"config.{key} must be {expected}, got {_quoted(value)}"


def _leaves(config: ConfigDict, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        if isinstance(value, ConfigDict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _quoted(value: Any) -> str:
    # Before repr, which fails for huge integers.
    if isinstance(value, int) and abs(value) >= 10**40:
        return "a number of more than 40 digits"
    text = " ".join(repr(value).split())
    return text if len(text) <= 80 else f"{text[:77]}..."


def keys(config: ConfigDict) -> list[str]:
    """Return all dotted keys of a config, leaves only."""
    return [key for key, _ in _leaves(config)]


def unknown_key(wanted: str, known: list[str]) -> str:
    """Error message for an unknown key, with the nearest known ones."""
    near = difflib.get_close_matches(wanted, known, n=3, cutoff=0.5)
    hint = "the nearest are " + ", ".join(f"config.{key}" for key in near) + "; " if near else ""
    place = "configs/sweep.py" if wanted.startswith("axes.") else "configs/base.py"
    return f"unknown configuration key config.{wanted}: {hint}see {place} for all of them."

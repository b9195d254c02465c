"""The layout of a working directory, and the weights of its runs.

WORKDIR/config.json                    the last configuration
WORKDIR/data/                          tokenizer, blocks, manifest (or config.data.directory)
WORKDIR/stages/NAME/checkpoints/       for each entry of the pipeline; repeated ones: NAME_2 ..
WORKDIR/stages/NAME/metrics.jsonl, tensorboard/
WORKDIR/report/                        table, pictures, samples
"""

import functools
import pathlib
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from fsdfm_jax.network import model as model_lib
from fsdfm_jax.network.config import ModelConfig
from fsdfm_jax.network.model import Params
from fsdfm_jax.parallel import mesh as mesh_lib
from fsdfm_jax.parallel import processes
from fsdfm_jax.training import checkpoint


class Weights(NamedTuple):
    """Weights for inference: the EMA if the stage has one."""

    params: Params
    model: ModelConfig
    metadata: dict[str, Any]
    step: int


def stage_directory(workdir: pathlib.Path, run: str) -> pathlib.Path:
    """Folder of a run's checkpoints and metrics."""
    return workdir / "stages" / run


def is_trained(directory: pathlib.Path) -> bool:
    """Return whether the run in `directory` has a checkpoint, damaged or not."""
    return checkpoint.newest_step(directory / "checkpoints") is not None


def saved_metadata(directory: pathlib.Path) -> dict[str, Any] | None:
    """Metadata of the checkpoint that the run in `directory` resumes from, or None.

    A checkpoint with damaged metadata is skipped, as the run does.
    """
    folder = directory / "checkpoints"
    step = checkpoint.latest_step(folder)
    return None if step is None else checkpoint.read_metadata(folder, step)


def weights_metadata(
    directory: pathlib.Path, step: int | None = None, *, together: bool = False
) -> tuple[int, dict[str, Any]]:
    """Step and metadata of a run's checkpoint, the newest by default.

    With `together` all processes of a job call and get the same checkpoint.

    Raises:
      ValueError: if there is no checkpoint, or it is damaged.
    """
    folder = directory / "checkpoints"
    newest = lambda: [found for found in [checkpoint.newest_step(folder)] if found is not None]
    if step is None:
        step = next(iter(processes.from_first(newest) if together else newest()), None)
    if step is None:
        raise ValueError(
            f"There is no checkpoint in {folder}; train that run first (python -m fsdfm_jax.main)."
        )
    return step, checkpoint.read_metadata(folder, step)


def load_weights(
    directory: pathlib.Path,
    *,
    tokenizer: str | None = None,
    mesh: Mesh | None = None,
    step: int | None = None,
) -> Weights:
    """Load the weights of a run.

    Args:
      directory: WORKDIR/stages/RUN.
      tokenizer: required fingerprint of the tokenizer; None skips the check.
      mesh: shard them over this mesh by `parallel.rules`; all processes of a job must call. By
        default they go to this process's first device.
      step: of the checkpoint, by default the newest.

    Raises:
      ValueError: if there is no checkpoint, it is damaged or has another tokenizer, or a parameter
        isn't finite.
    """
    together = mesh is not None and jax.process_count() > 1
    step, metadata = weights_metadata(directory, step, together=together)
    if tokenizer is not None and metadata["tokenizer"] != tokenizer:
        raise ValueError(
            f"The checkpoint in {directory} was trained with tokenizer "
            f"{metadata['tokenizer']}, but the data has {tokenizer}: their token ids mean "
            "different text. Use the tokenizer.json of the run."
        )
    part = metadata["weights"]
    place = None if mesh is None else functools.partial(mesh_lib.leaf_sharding, mesh)
    folder = directory / "checkpoints"
    restored = checkpoint.restore_part(folder, (part,), step, sharding=place, together=together)
    check = functools.partial(_check_finite, restored[part], folder, step)
    processes.together(check) if together else check()
    return Weights(restored[part], ModelConfig(**metadata["model"]), metadata, step)


def _check_finite(params: Params, folder: pathlib.Path, step: int) -> None:
    """Raise ValueError naming the first parameter with a non-finite value in this process."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        for shard in leaf.addressable_shards:
            if not np.isfinite(np.sum(np.asarray(shard.data), dtype=np.float64)):
                name = jax.tree_util.keystr(path, simple=True, separator="/")
                raise ValueError(
                    f"The weights of step {step} in {folder} are damaged: {name} has values that "
                    "are NaN or infinite. Use an earlier checkpoint, or train that run again."
                )


def weight_shapes(directory: pathlib.Path) -> Params:
    """Return the shapes of a run's weights, as `jax.ShapeDtypeStruct`s, without reading them."""
    saved = saved_metadata(directory) or weights_metadata(directory)[1]
    model = ModelConfig(**saved["model"])
    return jax.eval_shape(lambda: model_lib.init_params(jax.random.key(0), model))

"""The real training loop and command line around a stage that compiles at once.

    python tests/toy_job.py --directory=DIR --num_steps=9

Tests run it as a separate process, which can be stopped, killed, starved and hung.
"""

import hashlib
import itertools
import pathlib
import resource
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import flags
from ml_collections import ConfigDict

from fsdfm_jax import cli, stages
from fsdfm_jax.parallel import mesh as mesh_lib
from fsdfm_jax.training import checkpoint
from fsdfm_jax.training import loop as loop_lib

SIZE = 20_000  # of the weights: noise, so that a checkpoint has more than 80 kB
B, L = 8, 6

FLAGS = flags.FLAGS
flags.DEFINE_string("directory", None, "Of the stage.")
flags.DEFINE_integer("stages", 1, "Stages that run one after the other, in DIR, DIR_2 ..")
flags.DEFINE_integer("num_steps", 9, "")
flags.DEFINE_integer("checkpoint_every", 3, "")
flags.DEFINE_integer("max_skipped", 0, "")
flags.DEFINE_float("watchdog_minutes", 0.0, "")
flags.DEFINE_multi_integer("poison", [], "Steps whose loss is NaN.")
flags.DEFINE_float("pause", 0.0, "Seconds that a batch takes.")
flags.DEFINE_integer("wait_at", None, "Step whose batch never comes.")
flags.DEFINE_integer("count_at", None, "Step whose batch never comes, in a loop of C.")
flags.DEFINE_integer("wait_in", None, "Step that never ends on the device.")
flags.DEFINE_bool("wait_outside", False, "Wait where nothing is trained, at the end.")
flags.DEFINE_float("slow_save", 0.0, "Seconds that a checkpoint takes.")
flags.DEFINE_integer("file_bytes", None, "Size that a file can have: a full disk.")
flags.DEFINE_integer("forgets", 0, "A planted bug: steps that a resumed run skips in its text.")


def batches(start: int):
    """The batches from step `start` on; step n is made of batch n - 1."""
    for n in itertools.count(start + (FLAGS.forgets if start else 0)):
        if n + 1 == FLAGS.wait_at:
            print("waits", flush=True)
            threading.Event().wait()
        if n + 1 == FLAGS.count_at:
            print("counts", flush=True)
            hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)
        time.sleep(FLAGS.pause)
        x1_BL = np.full((B, L), 3 * n % 7, np.int32)
        x1_BL[0, 0] = -1 if n + 1 in FLAGS.poison else -2 if n + 1 == FLAGS.wait_in else x1_BL[1, 1]
        yield {"x1": x1_BL}


def endless(wanted):
    """0, or on request a computation that never ends, like one that waits for a lost host."""
    return jax.lax.while_loop(lambda x: wanted & (x >= 0), lambda x: (x + 1) % 7, 0 * wanted)


def init_params(key, base):
    """Noise."""
    del base
    return {"w": jax.random.normal(key, (SIZE,))}


def loss(params, frozen, key, batch):
    """w follows the batch, and noise of the step's key."""
    x1_BL = batch["x1"]
    first = x1_BL[0, 0]
    target = x1_BL[1:].astype(jnp.float32).mean() + jax.random.normal(key) + endless(first == -2)
    value = jnp.mean((params["w"] - target) ** 2) + jnp.where(first == -1, jnp.nan, 0.0)
    return value, {"loss": value, "frozen": frozen.average["w"][0]}


class SlowCheckpoints(checkpoint.Checkpoints):
    """Reports its progress and is slow."""

    def save(self, step, *rest):
        """Save as the real class does."""
        print(f"saves {step}", flush=True)
        time.sleep(FLAGS.slow_save)
        super().save(step, *rest)


def main(argv):
    del argv
    if FLAGS.file_bytes is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (FLAGS.file_bytes, FLAGS.file_bytes))
    loop_lib.Checkpoints = SlowCheckpoints
    settings = loop_lib.Settings(
        num_steps=FLAGS.num_steps,
        batch_size=B,
        log_every=1,
        checkpoint_every=FLAGS.checkpoint_every,
        ema_decay=0.5,
        max_skipped=FLAGS.max_skipped,
        watchdog_minutes=FLAGS.watchdog_minutes,
    )
    for number in range(1, FLAGS.stages + 1):
        loop_lib.train(
            stages.Stage("toy", None, init_params, loss),
            settings,
            name="toy",
            optimizer=optax.adam(0.1),
            batches=batches,
            base=None,
            key=jax.random.key(number),
            mesh=mesh_lib.make_mesh(ConfigDict({"data": 1, "fsdp": 1, "tensor": 1, "slices": 1})),
            directory=pathlib.Path(FLAGS.directory + (f"_{number}" if number > 1 else "")),
            metadata={"of": "toy"},
        )
    if FLAGS.wait_outside:
        print("waits", flush=True)
        threading.Event().wait()


if __name__ == "__main__":
    cli.run(main)

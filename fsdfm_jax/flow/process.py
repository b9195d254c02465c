"""The noising process of a run: schedule, source, and the jumps defined on them."""

from typing import NamedTuple

import jax

from fsdfm_jax.flow import jumps, paths, schedules, sources
from fsdfm_jax.flow.jumps import Finalize, Jump, JumpRule
from fsdfm_jax.flow.schedules import Schedule
from fsdfm_jax.flow.sources import Source


class Process(NamedTuple):
    """The noising process that all stages of a run share.

    >>> import fsdfm_jax as fs, jax, jax.numpy as jnp
    >>> process = fs.Process(fs.Polynomial(), fs.Source(vocab_size=5))
    >>> x0_BL, x1_BL = jnp.zeros((2, 4), int), jnp.full((2, 4), 3)
    >>> t_B = jnp.array([0.0, 1.0])
    >>> process.sample_path(jax.random.key(0), x0_BL, x1_BL, t_B).tolist()
    [[0, 0, 0, 0], [3, 3, 3, 3]]

    Attributes:
      schedule: kappa, see `schedules`.
      source: distribution of the noise x0.
      eos_id: the token between documents; also the first input of an autoregressive network.
      revealed: with a mask source, whether revealed tokens "stay" or may "jump" again, as in the
        official solver. No effect with a uniform source.
    """

    schedule: Schedule
    source: Source
    eos_id: int = 0
    revealed: str = "stay"

    def sample_path(
        self, key: jax.Array, x0_BL: jax.Array, x1_BL: jax.Array, t_B: jax.Array
    ) -> jax.Array:
        """Draw xt from the mixture path, see `paths.sample_path`."""
        return paths.sample_path(key, self.schedule, x0_BL, x1_BL, t_B)

    def make_jump(self, rule: JumpRule) -> Jump:
        """Make the jump of a rule for this process, see `jumps.make_process_jump`."""
        return jumps.make_process_jump(rule, self.schedule, self.source, self.revealed)

    @property
    def finalize(self) -> Finalize:
        """The sampler's last draw, see `jumps.make_finalize`."""
        return jumps.make_finalize(self.source)


def make_process(
    *, schedule: str, power: float, source: str, revealed: str, num_tokens: int, eos_id: int
) -> Process:
    """Make the process described by `config.path`, over the ids of a tokenizer.

    Args:
      schedule, power: see `schedules.make_schedule`.
      source: see `sources.make_source`.
      revealed: "stay" | "jump".
      num_tokens: size of the text vocabulary; a mask source adds one id.
      eos_id: the token between documents.

    Raises:
      ValueError: for an unknown name or a non-positive power.
    """
    process = Process(
        schedules.make_schedule(schedule, power=power),
        sources.make_source(source, num_tokens=num_tokens),
        eos_id,
        revealed,
    )
    process.make_jump(jumps.EULER)  # checks `revealed`
    return process

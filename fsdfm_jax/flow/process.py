"""The noising process of a run: schedule, source, and what a jump does on them."""

from typing import Any, NamedTuple

from fsdfm_jax.flow import jumps, schedules, sources
from fsdfm_jax.flow.jumps import Jump, JumpRule, Redraw
from fsdfm_jax.flow.schedules import Schedule
from fsdfm_jax.flow.sources import Source


class Process(NamedTuple):
    """The noising process that all stages of a run share, and the token between documents.

    `revealed` says whether, with a mask source, tokens once revealed "stay" or may "jump" again.
    """

    schedule: Schedule
    source: Source
    eos_id: int
    revealed: str = "stay"

    def make_jump(self, rule: JumpRule) -> Jump:
        """The rule on this process, see `jumps.make_process_jump`."""
        return jumps.make_process_jump(rule, self.schedule, self.source, self.revealed)

    def make_redraw(self, rule: JumpRule) -> Redraw:
        """What the rule draws anew on this process, see `jumps.make_redraw`."""
        return jumps.make_redraw(rule, self.schedule, self.source, self.revealed)


def make_process(path: Any, *, num_tokens: int, eos_id: int) -> Process:
    """The process of `config.path` over a tokenizer's `num_tokens` ids."""
    process = Process(
        schedules.make_schedule(path.schedule, power=path.power),
        sources.make_source(path.source, num_tokens=num_tokens),
        eos_id,
        path.revealed,
    )
    process.make_jump(jumps.EULER)  # refuses what no jump can be made of
    return process

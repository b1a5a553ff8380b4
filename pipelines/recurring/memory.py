"""What ticks remember of failures, so that nothing is tried for ever and nothing is forgotten.

    {"inputs": digest, "failed": {step: runs in a row}, "lost": {step: runs in a row}, "units": {unit: runs}, "trouble": bool}

Enters: the memory that the last record holds, and what a run came to. Leaves: the next one. Always holds: it is a fold
over the records in their order, so whoever has the newest record knows all of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pipelines.recurring.recipe import Retries
from pipelines.recurring.state import ENDED_WELL, Result


@dataclass(kw_only=True)
class Memory:
    """Failures of late."""

    inputs: str = ""
    """Digest of the listing of all sources at the last run."""
    failed: dict[str, int] = field(default_factory=dict)
    """Runs in a row in which a step failed while the inputs stayed the same."""
    lost: dict[str, int] = field(default_factory=dict)
    units: dict[str, int] = field(default_factory=dict)
    trouble: bool = False
    """Whether the last run did not end well."""

    @classmethod
    def of(cls, values: Mapping[str, Any] | None) -> Memory:
        return cls(**values) if values else cls()

    def after(self, planned: Sequence[str], inputs: str, results: Sequence[Result], lost: bool) -> Memory:
        """The memory after a run."""
        units = dict(self.units)
        # Whatever came since may be the remedy, so all of it is tried anew.
        failed, gone = (dict(self.failed), dict(self.lost)) if inputs == self.inputs else ({}, {})
        last = {r.step: r for r in results}
        for step in planned:
            if step in last and last[step].outcome in (*ENDED_WELL, "refused"):
                failed.pop(step, None)
                gone.pop(step, None)
            elif step in last and last[step].outcome == "failed":
                # Where single units are to blame they are counted, and the step goes on without them.
                if not last[step].units:
                    failed[step] = failed.get(step, 0) + 1
                for unit in last[step].units:
                    units[unit] = units.get(unit, 0) + 1
                break
            else:
                if lost:
                    gone[step] = gone.get(step, 0) + 1
                break
        well = not lost and all(r.outcome in ENDED_WELL for r in last.values())
        return Memory(inputs=inputs, failed=failed, lost=gone, units=units, trouble=not well)

    def given_up(self, step: str, retries: Retries, inputs: str) -> str:
        """Why a step is not tried again, or ""."""
        if inputs != self.inputs:
            return ""
        if (count := self.failed.get(step, 0)) >= retries.runs:
            return f"given up after it failed in {count} runs"
        if (count := self.lost.get(step, 0)) >= retries.lost_runs:
            return f"given up after {count} runs ended in it without a word"
        return ""

    def set_aside(self, retries: Retries) -> list[str]:
        """Units that failed too often."""
        return sorted(unit for unit, count in self.units.items() if count >= retries.runs)

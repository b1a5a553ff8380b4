"""Which dataset each sequence of a run comes from.

Enters: stages, each with datasets, weights and a budget of sequences. Leaves: a choice for every sequence. Always holds: a
choice follows from the weights and from how many sequences each dataset has given in the stage, so after any number of them
each dataset has given its share to within one, and nothing but these counts need be remembered.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from pipelines.loading.index import Index, Int64s, LoadingError

_UNIT = 1 << 32
"""Weights are compared as whole numbers of this fraction, so that no rounding ever decides."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Component:
    """One dataset of a mixture."""

    name: str
    """What positions and losses are kept under: the same name and version in two stages is one stream that goes on."""
    index: Index
    """The pieces of one split."""
    weight: float = 1.0
    """Its share of the sequences, against the other components' weights."""

    @property
    def key(self) -> str:
        """Name of its stream."""
        return f"{self.name}@{self.index.dataset.version}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """So many sequences from a mixture."""

    components: tuple[Component, ...]
    sequences: int | None = None
    """None goes on for ever, and can only be the last stage's."""


def require_mixture(stages: Sequence[Stage]) -> None:
    """Refuse what cannot be mixed.

    Raises:
        LoadingError: two components of a name, or two that differ in vocabulary or sequence length.
    """
    components = [component for stage in stages for component in stage.components]
    first = components[0].index
    for stage in stages:
        names = [component.name for component in stage.components]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise LoadingError(f"two datasets of one mixture are called {twice}; give one of them another `name`")
    for component in components:
        index = component.index
        first.vocabulary.require_same(index.vocabulary, this=first.dataset.uri, that=index.dataset.uri)
        if index.sequence_length != first.sequence_length:
            raise LoadingError(
                f"{component.name} is cut for {index.sequence_length} tokens, {components[0].name} for "
                f"{first.sequence_length}; index all of a mixture with one sequence length"
            )


@dataclass
class Chooser:
    """Where a run stands in its stages."""

    stages: tuple[Stage, ...]
    stage: int = 0
    taken: dict[str, int] = field(default_factory=dict)
    """Sequences that each component has given in this stage, by key."""

    def choose(self, count: int) -> Int64s:
        """int64 [count]: the number, in `keys`, of the dataset of each next sequence; fewer where the last stage ends."""
        chosen: list[int] = []
        while len(chosen) < count:
            stage = self.stages[self.stage]
            done = sum(self.taken.values())
            left = count - len(chosen)
            if stage.sequences is not None:
                left = min(left, stage.sequences - done)
            chosen += self._mixed(stage, left, done)
            if done + left == stage.sequences:
                if self.stage + 1 == len(self.stages):
                    break
                self.stage, self.taken = self.stage + 1, {}
        return np.array(chosen, np.int64)

    @cached_property
    def keys(self) -> Mapping[str, int]:
        """The streams of the run, in the order in which its stages name them."""
        keys = dict.fromkeys(component.key for stage in self.stages for component in stage.components)
        return {key: number for number, key in enumerate(keys)}

    def _mixed(self, stage: Stage, count: int, done: int) -> list[int]:
        """Each sequence from the component that is furthest behind its share; of equals, from the first."""
        keys = [component.key for component in stage.components]
        numbers = [self.keys[component.key] for component in stage.components]
        given = [self.taken.get(key, 0) for key in keys]
        if len(keys) == 1:
            self.taken[keys[0]] = given[0] + count
            return numbers * count
        total = sum(component.weight for component in stage.components)
        shares = [round(component.weight / total * _UNIT) for component in stage.components]
        # How far each is behind, in sequences times the sum of the shares.
        whole = sum(shares)
        behind = [share * (done + 1) - whole * n for share, n in zip(shares, given, strict=True)]
        chosen = []
        for _ in range(count):
            pick = behind.index(max(behind))
            chosen.append(numbers[pick])
            given[pick] += 1
            behind[pick] -= whole
            behind = [value + share for value, share in zip(behind, shares, strict=True)]
        self.taken = dict(zip(keys, given, strict=True))
        return chosen

"""What a run trains on, as a recipe says it: one dataset, a mixture of several, or stages of mixtures.

Enters: the section `data`. Leaves: settings that know all their datasets in one order. Always holds: one dataset is a
mixture of one, and a mixture is a run of one stage, so that what reads settings has one case.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Self

from pydantic import Field, model_validator

from pipelines.recipe import Settings
from pipelines.sequence import Vocabulary


class DatasetSettings(Settings):
    """One dataset of a mixture."""

    dataset: str
    """Folder or URI of the token dataset."""
    version: int | None = Field(default=None, ge=0)
    """Pinned version; null takes the newest when the run starts, and keeps to it when the run goes on."""
    weight: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    """Its share of the sequences, against the other weights of the mixture."""
    name: str | None = None
    """What its losses are called; null is the last part of its path."""

    @property
    def label(self) -> str:
        return self.name or self.dataset.rstrip("/").rpartition("/")[2]


class DataStage(Settings):
    """A mixture for part of a run."""

    mixture: tuple[DatasetSettings, ...] = Field(min_length=1)
    steps: int | None = Field(default=None, ge=1)
    """Optimizer steps; the last stage may leave steps and tokens out, and goes on to the end of the run."""
    tokens: int | None = Field(default=None, ge=1)
    """Token budget, padding included, rounded up to whole steps."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.steps is not None and self.tokens is not None:
            raise ValueError("the length of a stage is given by `steps` or by `tokens`: give one of them")
        labels = [part.label for part in self.mixture]
        if twice := next((label for label in labels if labels.count(label) > 1), None):
            raise ValueError(f"two datasets of one mixture are called {twice}; give one of them another `name`")
        return self

    def length(self, tokens_per_step: int) -> int | None:
        """Optimizer steps of the stage; None goes on to the end of the run."""
        return math.ceil(self.tokens / tokens_per_step) if self.tokens is not None else self.steps


class MixtureSettings(Settings):
    """The keys of `data` that say what is trained on."""

    dataset: str = ""
    """Folder or URI of the token dataset. Give it, or `mixture`, or `stages`."""
    version: int | None = Field(default=None, ge=0)
    """Pinned version of `dataset`; null takes the newest when the run starts, and keeps to it when the run goes on."""
    mixture: tuple[DatasetSettings, ...] = ()
    """Several datasets with weights; each packed sequence comes from one of them."""
    stages: tuple[DataStage, ...] = ()
    """Mixtures one after the other."""
    audio_codebooks: int | None = Field(default=None, ge=1)
    """Train on the first so many audio codebooks alone; null takes all."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        given = [name for name in ("dataset", "mixture", "stages") if getattr(self, name)]
        if len(given) != 1:
            raise ValueError(
                f"the data is given by one of `dataset`, `mixture` and `stages`, and here by {' and '.join(given) or 'none'}"
            )
        if self.version is not None and not self.dataset:
            raise ValueError("`version` belongs to `dataset`; give each dataset of a mixture its own")
        for number, stage in enumerate(self.stages[:-1], start=1):
            if stage.steps is None and stage.tokens is None:
                raise ValueError(f"stage {number} of {len(self.stages)} has no length; give it `steps` or `tokens`")
        return self

    @property
    def all_stages(self) -> tuple[DataStage, ...]:
        """The stages, also of one mixture or one dataset."""
        if self.stages:
            return self.stages
        one = (DatasetSettings(dataset=self.dataset, version=self.version),) if self.dataset else self.mixture
        return (DataStage(mixture=one),)

    @property
    def parts(self) -> list[DatasetSettings]:
        """Every dataset of every stage, in the order in which they are written."""
        return [part for stage in self.all_stages for part in stage.mixture]

    def view_of(self, vocabulary: Vocabulary) -> Vocabulary:
        """A dataset's vocabulary with the codebooks that are trained on."""
        return vocabulary if self.audio_codebooks is None else vocabulary.first_codebooks(self.audio_codebooks)

    def pinned(self, versions: Sequence[int | None]) -> Self:
        """The same with a version for each of `parts` that has none yet."""
        left = iter(versions)

        def pin(mixture: Sequence[DatasetSettings]) -> tuple[DatasetSettings, ...]:
            return tuple(
                part.model_copy(update={"version": version if part.version is None else part.version})
                for part, version in zip(mixture, left, strict=False)
            )

        if self.dataset:
            return self.model_copy(update={"version": pin(self.parts)[0].version})
        if self.mixture:
            return self.model_copy(update={"mixture": pin(self.mixture)})
        stages = tuple(stage.model_copy(update={"mixture": pin(stage.mixture)}) for stage in self.stages)
        return self.model_copy(update={"stages": stages})

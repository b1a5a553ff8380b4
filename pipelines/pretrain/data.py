"""The data of a run: datasets opened at one version on all ranks, and the loaders of both splits.

Enters: a `PretrainRecipe`. Leaves: a `RunData`. Always holds: all ranks see the same versions, also while a job is adding to
a dataset; and a dataset that several stages name is indexed once.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import islice

from pipelines.loading import Component, Index, Loader, Stage
from pipelines.pretrain.parallelize import Ranks
from pipelines.pretrain.recipe import PretrainRecipe
from pipelines.pretrain.validate import Validator
from pipelines.sequence import Vocabulary
from pipelines.shards.dataset import Dataset
from pipelines.shards.statistics import Statistics


@dataclass(frozen=True, kw_only=True, slots=True)
class RunData:
    """What a run trains on, opened."""

    recipe: PretrainRecipe
    """With every version pinned."""
    stages: tuple[Stage, ...]
    """Of both splits."""
    datasets: tuple[Dataset, ...]
    """Each version once, the first stage's first."""

    @property
    def vocabulary(self) -> Vocabulary:
        """What the ids of the batches mean."""
        return self.stages[0].components[0].index.vocabulary

    @property
    def first(self) -> Dataset:
        """The first dataset of the first stage."""
        return self.datasets[0]

    def statistics(self) -> Statistics:
        """Of all datasets together, each counted once."""
        whole = self.datasets[0].statistics()
        for dataset in self.datasets[1:]:
            whole.merge(dataset.statistics())
        return whole


def open_data(recipe: PretrainRecipe, ranks: Ranks) -> RunData:
    """Open and index everything; every rank must call it.

    Raises:
        DatasetError, LoadingError: a dataset cannot be opened, or not be trained on with this sequence length.
        VocabularyError: two of them have different vocabularies.
    """
    opened = [_open(part.dataset, part.version, ranks) for part in recipe.data.parts]
    recipe = recipe.model_copy(update={"data": recipe.data.pinned([dataset.version for dataset in opened])})
    indexes: dict[tuple[str, int], Index] = {}
    left = iter(opened)
    stages = []
    for stage in recipe.data.all_stages:
        components = []
        for part, dataset in zip(stage.mixture, left, strict=False):
            key = dataset.uri, dataset.version
            if key not in indexes:
                indexes[key] = Index.build(dataset, recipe.data.sequence_length, recipe.data.audio_codebooks)
            components.append(Component(name=part.label, index=indexes[key], weight=part.weight))
        steps = stage.length(recipe.tokens_per_step)
        sequences = None if steps is None else steps * recipe.batch.sequences
        stages.append(Stage(components=tuple(components), sequences=sequences))
    distinct = {(dataset.uri, dataset.version): dataset for dataset in opened}
    return RunData(recipe=recipe, stages=tuple(stages), datasets=tuple(distinct.values()))


def train_loader(data: RunData, ranks: Ranks, seed: int) -> Loader:
    """The batches of a rank."""
    recipe = data.recipe
    return Loader(
        _split(data.stages, validation=False),
        sequences=recipe.batch.sequences,
        micro_batch=recipe.batch.micro_batch,
        seed=seed,
        window_tokens=recipe.data.window_tokens,
        rank=ranks.rank,
        world_size=ranks.world_size,
        target_sizes=recipe.data.target_sizes,
        prefetch=recipe.data.prefetch,
        workers=recipe.data.workers,
        pin_memory=ranks.device.type == "cuda",
    )


def make_validator(data: RunData, ranks: Ranks) -> Validator:
    """The held-out documents of every dataset, in memory."""
    recipe = data.recipe
    sequences = recipe.batch.micro_batch * ranks.world_size
    loader = Loader(
        _split(data.stages, validation=True),
        sequences=sequences,
        micro_batch=recipe.batch.micro_batch,
        # Runs of different seeds are compared on the same sequences.
        seed=0,
        window_tokens=recipe.data.window_tokens,
        rank=ranks.rank,
        world_size=ranks.world_size,
        endless=False,
        target_sizes=recipe.data.target_sizes,
        prefetch=0,
        workers=0,
    )
    most = None if recipe.validation.sequences is None else -(-recipe.validation.sequences // sequences)
    return Validator(islice(loader, most), data.vocabulary, ranks, loader.names)


def _open(uri: str, version: int | None, ranks: Ranks) -> Dataset:
    dataset = Dataset.open(uri, version)
    agreed = ranks.agree(dataset.version)
    return dataset if dataset.version == agreed else Dataset.open(uri, agreed)


def _split(stages: tuple[Stage, ...], *, validation: bool) -> tuple[Stage, ...]:
    parts = {id(c.index): c.index.split(validation=validation) for stage in stages for c in stage.components}
    return tuple(
        replace(stage, components=tuple(replace(c, index=parts[id(c.index)]) for c in stage.components))
        for stage in stages
    )

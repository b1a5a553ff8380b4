"""What every reader is: settings of a recipe that list a corpus and read slices of it.

Enters: a section of a recipe. Leaves: inputs, cheap enough to list before any work is planned, then documents and
rejects. Always holds: both are streams, and what a slice gives depends on the slice and the settings alone, so any
worker may read it.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import ClassVar, Self

from pydantic import Field

from pipelines.corpus.documents import Document, Dropped, Input, Reject, Slice
from pipelines.corpus.filters import Filters
from pipelines.recipe import Settings
from pipelines.sequence import Vocabulary


class Reader(Settings):
    """Base of the sources of a recipe."""

    decides_rows: ClassVar[frozenset[str]] = frozenset({"filters", "seed", "weight"})
    """Settings that decide what the rows of an input are: a dataset that has rows of the source keeps to them."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """First part of every document's identity: rename a source and all of its documents are new."""
    weight: float = Field(1.0, gt=0, le=1)
    """Share of the documents to take, drawn by row id. To see documents more than once, weigh datasets in training."""
    seed: int = 0
    """Another seed draws other documents and templates."""
    filters: Filters = Filters()

    @property
    def has_media(self) -> bool:
        """Whether its documents may hold pictures or sounds to encode; a GPU is of no use for a source without."""
        return True

    @abstractmethod
    def inputs(self) -> Iterator[Input]:
        """What there is to read, sorted by uri.

        Raises:
            CorpusError: the corpus is missing or empty, or a folder of it cannot be listed.
        """

    @abstractmethod
    def read(self, slices: Sequence[Slice]) -> Iterator[Document | Reject | Dropped]:
        """The documents of the slices, in order; a `Reject` in place of each that cannot be read, a `Dropped` in place of
        each that a filter of the reader's own takes out."""

    def bound(self, vocabulary: Vocabulary, sequence_length: int) -> Self:
        """The reader as a job uses it: it knows what the job makes ids of, and how long a sequence may be.

        Raises:
            VocabularyError: what it reads was made with other tokenizers.
        """
        return self

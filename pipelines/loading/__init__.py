"""From versions of token datasets to packed batches, in an order that a small state restores.

    index    which documents there are, how long, in which split, and where the long ones are cut
    packing  the order of an epoch, its windows, and which pieces share a sequence
    reading  one row group, of the codebooks that a view keeps
    windows  the tokens of one window, laid out as rows
    stream   the sequences of one dataset, epoch after epoch
    mixture  which dataset each sequence comes from, by stages
    batch    rows to a `PackedBatch`: boundaries and targets in fixed shapes
    loader   the batches of one rank, made ahead by threads

The sequence of global batches follows from the dataset versions, the recipe and the seed alone. Ranks only take
their part of each batch, so a run goes on with another number of them exactly where it stopped.
"""

from pipelines.loading.index import Index, LoadingError
from pipelines.loading.loader import Loader, StepBatch
from pipelines.loading.mixture import Component, Stage

__all__ = ["Component", "Index", "Loader", "LoadingError", "Stage", "StepBatch"]

"""From one version of a token dataset to packed batches, in an order that a small state restores.

    index    which documents there are, how long, in which split, and where the long ones are cut
    packing  the order of an epoch, its windows, and which pieces share a sequence
    windows  the tokens of one window, laid out as rows
    batch    rows to a `PackedBatch`: boundaries and targets in fixed shapes
    loader   the batches of one rank, made ahead by a thread

The sequence of global batches follows from the dataset version, the seed and the sequence length alone. Ranks only take
their part of each batch, so a run goes on with another number of them exactly where it stopped.
"""

from pipelines.loading.index import Index, LoadingError
from pipelines.loading.loader import Loader, StepBatch

__all__ = ["Index", "Loader", "LoadingError", "StepBatch"]

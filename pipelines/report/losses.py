"""A run's validation losses beside what token frequencies alone reach, as a terminal table."""

from __future__ import annotations

from collections.abc import Iterable

from rich.table import Table


def validation_table(validation: Iterable[tuple[str, float]], baseline: Iterable[tuple[str, float]]) -> Table:
    """Cross-entropies in nats a token, by modality and audio codebook.

    Args:
        validation, baseline: (name, value) pairs, `CrossEntropy.items` of the model and of the smoothed unigram.
    """
    table = Table("nats a token", "model", "unigram", "gain", caption="Validation split; lower is better.")
    for column in table.columns[1:]:
        column.justify = "right"
    reference = dict(baseline)
    for name, loss in validation:
        if name in reference:
            gain = reference[name] - loss
            table.add_row(
                name, f"{loss:.3f}", f"{reference[name]:.3f}", f"{gain:+.3f}", style="red" if gain < 0 else ""
            )
    return table

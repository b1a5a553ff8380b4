"""What deserves a look in the figures of a dataset: each remark states its figure, and this file the limits.

Enters: the figures of `summarize`. Leaves: sentences. Always holds: no remark about a figure within its limit.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

_MOST_DUPLICATES = 0.05
"""Above the estimate's own error of 1.6%."""
_MOST_DEAD = 0.1
"""Share of a codebook that no token uses. A text vocabulary is larger than most corpora need, so it has no limit."""
_LEAST_CODES_EACH = 10
"""Tokens a code of the codebook, below which unused codes say nothing of the tokenizer."""
_LEAST_USE = 0.5
"""Perplexity over size, of a codebook."""
_MOST_REJECTS = 0.01
_MOST_BYTE_PIECES = 0.02
_MOST_SKEW = 8.0
_LARGE_SHARD = 64_000_000
_SMALL_SHARD = 1_000_000
_MANY_SHARDS = 1_000
_MOST_PADDING = 0.05


def remarks(figures: dict[str, Any]) -> list[str]:
    """All remarks, the weightiest first."""
    return [*_documents(figures), *_codebooks(figures), *_shards(figures), *_lengths(figures)]


def _documents(figures: dict[str, Any]) -> Iterator[str]:
    documents = figures["documents"]
    if not documents:
        yield "The dataset has no documents."
        return
    if rejected := sum(figures["quarantine"].values()):
        share = rejected / (rejected + documents)
        if share > _MOST_REJECTS:
            yield f"{share:.1%} of the documents ({rejected:,}) are in quarantine."
    copies = 1 - figures["distinct_documents"] / documents
    if copies > _MOST_DUPLICATES:
        read = "each content once" if figures["duplicates"] == "drop" else "every copy"
        yield f"About {copies:.0%} of the documents repeat others; training reads {read}."


def _codebooks(figures: dict[str, Any]) -> Iterator[str]:
    for modality in ("image", "audio"):
        named = {n: b for n, b in figures["codebooks"].items() if n.partition(" ")[0] == modality}
        books = list(named.values())
        if not books or figures["tokens"][modality] / len(books) < _LEAST_CODES_EACH * books[0]["size"]:
            continue
        dead = {name: 1 - book["used"] / book["size"] for name, book in named.items()}
        dead = {name: share for name, share in dead.items() if share > _MOST_DEAD}
        if dead:
            low, high = f"{min(dead.values()):.0%}", f"{max(dead.values()):.0%}"
            shares = high if low == high else f"{low} to {high}"
            yield f"Never used: {shares} of the {books[0]['size']:,} codes of {_listed(list(dead))}."
        poor = [n for n, b in named.items() if n not in dead and b["perplexity"] < _LEAST_USE * b["size"]]
        if poor:
            used = max(named[name]["perplexity"] for name in poor)
            size = books[0]["size"]
            yield f"The codes of {_listed(poor)} are used as if there were {used:,.0f}, not {size:,} (perplexity)."
    share = figures["text_pieces"]["byte_share"]
    if share is not None and share > _MOST_BYTE_PIECES:
        yield f"{share:.1%} of the text pieces are bytes of characters that the text tokenizer does not have."


def _listed(names: list[str]) -> str:
    return f"codebook {names[0]}" if len(names) == 1 else f"codebooks {', '.join(names[:-1])} and {names[-1]}"


def _shards(figures: dict[str, Any]) -> Iterator[str]:
    sizes = figures["shard_sizes"]
    if sizes["largest_by_mean"] > _MOST_SKEW and sizes["bytes"]["1"] > _LARGE_SHARD:
        yield f"The largest shard has {sizes['bytes']['1'] / 1e6:,.0f} MB, {sizes['largest_by_mean']:.1f} times the mean."
    if figures["shards"] > _MANY_SHARDS and sizes["mean_bytes"] < _SMALL_SHARD:
        mean = sizes["mean_bytes"] / 1e6
        yield f"{figures['shards']:,} shards of {mean:.2f} MB on average: larger units (recipe: units) open faster."


def _lengths(figures: dict[str, Any]) -> Iterator[str]:
    for entry in figures["padding"]:
        if entry["sequence_length"] == figures["sequence_length"] and entry["packed"] > _MOST_PADDING:
            yield f"Packed to {entry['sequence_length']:,} tokens, {entry['packed']:.0%} of a batch would be padding."

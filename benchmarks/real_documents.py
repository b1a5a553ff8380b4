"""Real documents in one small file, for training on machines that have neither a dataset nor what reads one.

Enters: a token dataset. Leaves: a file of a few MB, and steps of packed rows from it. Always holds: media spans are never
cut; every run gets the same rows in the same order; a twentieth of the documents is held out, by source.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.packed_workload import Step, pack, packed_batch
from model import MODALITIES


@dataclass(frozen=True, slots=True)
class Documents:
    """Token and modality ids of one document after the other."""

    token_ids: np.ndarray
    modality_ids: np.ndarray
    ends: np.ndarray
    held_out: np.ndarray
    """bool, for each document."""
    vocab_sizes: dict[str, int]

    @property
    def tokens(self) -> int:
        return len(self.token_ids)

    def steps(self, count: int, *, sequences: int, micro_batch: int, length: int, held_out: bool = False) -> list[Step]:
        """Steps of packed rows; when all documents were used, they come again in another order."""
        rows: list[list[tuple[int, int]]] = []
        epoch = 0
        pieces = self._pieces(length, held_out)
        while len(rows) < count * sequences:
            rng = np.random.default_rng([epoch, int(held_out)])
            order = rng.permutation(len(pieces))
            by_length: dict[int, list[int]] = {}
            for index in order:
                by_length.setdefault(pieces[index][1] - pieces[index][0], []).append(int(index))
            packed = pack([end - start for start, end in pieces], length)
            made = [[pieces[by_length[size].pop()] for size in row] for row in packed]
            rows += [made[i] for i in rng.permutation(len(made))]
            epoch += 1
            if held_out:
                # Once is enough, whatever that comes to.
                break
        rows = rows[: count * sequences]
        return [
            self._step(rows[i : i + sequences], micro_batch, length)
            for i in range(0, len(rows) - len(rows) % sequences, sequences)
        ]

    def _pieces(self, length: int, held_out: bool) -> list[tuple[int, int]]:
        """Documents that fit, and texts that do not, in pieces that do."""
        pieces = []
        starts = np.concatenate([[0], self.ends[:-1]])
        for start, end, out in zip(starts.tolist(), self.ends.tolist(), self.held_out.tolist(), strict=True):
            if out != held_out:
                continue
            if end - start <= length:
                pieces.append((start, end))
            elif not self.modality_ids[start:end].any():
                pieces += [(at, min(end, at + length)) for at in range(start, end, length)]
        return [(start, end) for start, end in pieces if end - start > 1]

    def _step(self, rows: list[list[tuple[int, int]]], micro_batch: int, length: int) -> Step:
        batches = []
        for first in range(0, len(rows), micro_batch):
            mine = rows[first : first + micro_batch]
            token_ids, modality_ids = np.zeros((2, len(mine), length), np.int64)
            for b, row in enumerate(mine):
                at = 0
                for start, end in row:
                    token_ids[b, at : at + end - start] = self.token_ids[start:end]
                    modality_ids[b, at : at + end - start] = self.modality_ids[start:end]
                    at += end - start
            lengths = [[end - start for start, end in row] for row in mine]
            batches.append(packed_batch(token_ids, modality_ids, lengths))
        return Step(batches, sum(end - start for row in rows for start, end in row))


HELD_OUT = 0.05
"""Share of the documents."""


def write_documents(dataset: str, file: Path, text_share: float) -> Documents:
    """Put a dataset's documents into a file: all that have media, and texts, drawn at random, up to a share of the tokens.

    Needs what reads a dataset.
    """
    from pipelines.sequence import Modality
    from pipelines.shards.dataset import Dataset
    from pipelines.shards.split import is_validation

    opened = Dataset.open(dataset)
    chosen: list[tuple[np.ndarray, np.ndarray, bool]] = []
    texts: list[tuple[np.ndarray, np.ndarray, bool]] = []
    for batch in opened.read(["token_ids", "modality_ids", "source"]):
        for row in batch.to_pylist():
            ids, modalities = np.array(row["token_ids"], np.uint16), np.array(row["modality_ids"], np.int8)
            (chosen if modalities.any() else texts).append((ids, modalities, is_validation(row["source"], HELD_OUT)))
    media = sum(len(ids) for ids, _, _ in chosen)
    room = media * text_share / (1 - text_share) if media else float("inf")
    for index in np.random.default_rng(0).permutation(len(texts)):
        if len(texts[index][0]) <= room:
            chosen.append(texts[index])
            room -= len(texts[index][0])
    tokens, modalities_of, held_out = ([part[i] for part in chosen] for i in range(3))
    if max(opened.vocabulary.size(m) for m in Modality) > 1 << 16:
        raise ValueError(f"{dataset}: a vocabulary has more than 65,536 ids, which this file has no room for")
    sizes = {m.label: max(1, opened.vocabulary.size(m)) for m in Modality}
    file.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(
        file,
        token_ids=np.concatenate(tokens),
        modality_ids=np.concatenate(modalities_of),
        ends=np.cumsum([len(t) for t in tokens]),
        held_out=np.array(held_out),
        about=np.array(json.dumps({"dataset": dataset, "vocab_sizes": sizes})),
    )
    return read_documents(file)


def read_documents(file: Path) -> Documents:
    """What `write_documents` has written."""
    with np.load(file) as content:
        about = json.loads(str(content["about"]))
        return Documents(
            token_ids=content["token_ids"],
            modality_ids=content["modality_ids"],
            ends=content["ends"],
            held_out=content["held_out"],
            vocab_sizes={name: about["vocab_sizes"][name] for name in MODALITIES},
        )

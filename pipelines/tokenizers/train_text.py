"""`braid tokenizer train text`: a SentencePiece model from a folder of texts.

Enters: .txt files, and .jsonl files of which one field is text. Leaves: a folder with `NAME.model`, `card.json`, `card.md`.
Always holds: the same files, options and seed give the same model; memory is bounded, about five times `max_mb`, whatever the
data's size; and the model splits a text at single spaces between words as if each side stood alone, so that long texts are
encoded fast (`sentencepiece.TextTokenizer.divisible`).

Byte-pair encoding with bytes for what no piece covers, so nothing is unknown; no normalization, so a text comes back as it
was; digits stand alone, so a number is spelled one way.
"""

from __future__ import annotations

import hashlib
import io
import json
import platform
import random
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import sentencepiece

from pipelines.tokenizers.sentencepiece import TextTokenizer
from pipelines.tokenizers.text_evaluation import evaluate

SUFFIXES = (".txt", ".jsonl")
LONGEST = 1000
"""Characters of what the trainer sees at once; the library drops sentences of more than 4,192 bytes."""
READ_BYTES = 2**24
"""Of a line at once: what is longer comes in parts, so that no file can fill the memory."""
HELD_OUT_SHARE, HELD_OUT_BYTES = 0.05, 2_000_000
"""Of the lines, at most; and about so many bytes."""


class TextTrainingError(ValueError):
    """No model can be trained from this; the message says what to change."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TextTrainingOptions:
    """What `braid tokenizer train text` is told."""

    data: tuple[Path, ...]
    """Files and folders; folders are read recursively."""
    out: Path
    """The tokenizer's folder; its last part is the model's name."""
    pieces: int = 32_000
    max_mb: float = 200.0
    """Text to train on at most; of more, lines are drawn."""
    seed: int = 0
    text_field: str = "text"
    data_name: str = ""
    data_licence: str = ""
    command: str = ""


class _Sample:
    """Draws the lines to train on, and keeps some from it.

    Args:
        total: Bytes of all files.
    """

    def __init__(self, total: int, options: TextTrainingOptions) -> None:
        self.share = min(1.0, options.max_mb * 1e6 / max(total, 1))
        """Of the lines, to train on."""
        self.held_out: list[str] = []
        self.lines = self.bytes = 0
        self._held_out_share = min(HELD_OUT_SHARE, HELD_OUT_BYTES / max(total, 1))
        self._random = random.Random(options.seed)

    def draw(self, lines: Iterable[str]) -> Iterator[str]:
        for line in lines:
            if not line.strip():
                continue
            # By content, so that a line that stands twice is never on both sides.
            if _fraction(line) < self._held_out_share:
                self.held_out.append(line)
            elif self._random.random() < self.share:
                self.lines += 1
                self.bytes += len(line.encode())
                yield from _cut(line)


def train(options: TextTrainingOptions) -> Path:
    """Train, evaluate on held-out lines, and write the model with its card.

    Returns:
        The `.model` file.

    Raises:
        TextTrainingError: no text, or too little of it for so many pieces.
    """
    files = text_files(options.data)
    total = sum(path.stat().st_size for path in files)
    refused: list[str] = []
    sample = _Sample(total, options)
    lines = sample.draw(read_lines(files, options.text_field, refused))
    print(f"{len(files)} files, {total / 1e6:.1f} MB, of which {sample.share:.1%} are drawn", flush=True)
    model = _train_model(lines, options.pieces)
    for what in refused[:5]:
        print(f"left out: {what}", flush=True)
    if not sample.held_out:
        raise TextTrainingError(
            f"{sample.lines} lines, none of them held out to measure on; give some hundreds at least."
        )
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"{options.out.resolve().name}.model"
    part = path.with_suffix(".model.part")
    part.write_bytes(model)
    part.replace(path)
    tokenizer = TextTokenizer.load(path)
    card = {
        "name": tokenizer.name,
        "kind": "text",
        "sha256": tokenizer.sha256,
        "pieces": tokenizer.pieces,
        "divisible": tokenizer.divisible,
        "data": options.data_name or ", ".join(path.name for path in options.data),
        "data_licence": options.data_licence or "not stated",
        "files": len(files),
        "data_bytes": total,
        "trained_on": {"lines": sample.lines, "bytes": sample.bytes},
        "left_out": len(refused),
        "seed": options.seed,
        "software": f"sentencepiece {version('sentencepiece')}, Python {platform.python_version()}",
        "command": options.command,
        "held_out": evaluate(tokenizer, sample.held_out),
    }
    (options.out / "card.json").write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")
    (options.out / "card.md").write_text(card_text(card), encoding="utf-8")
    return path


def text_files(data: Iterable[Path]) -> list[Path]:
    """Files of `SUFFIXES`, those below folders too, in a stable order, each once.

    Raises:
        TextTrainingError: a path that is not there, or no such file at all.
    """
    found: dict[Path, None] = {}
    for path in data:
        if path.is_dir():
            found |= dict.fromkeys(sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file()))
        elif path.is_file():
            found[path] = None
        else:
            raise TextTrainingError(f"{path}: no such file or folder.")
    if not found:
        raise TextTrainingError(f"{', '.join(map(str, data))}: no text file ({', '.join(SUFFIXES)}) in it.")
    return list(found)


def read_lines(files: Iterable[Path], text_field: str, refused: list[str]) -> Iterator[str]:
    """The lines of texts, without their ends; what is no text is told in `refused`."""
    for path in files:
        is_json = path.suffix.lower() == ".jsonl"
        with path.open("rb") as file:
            for number, raw in enumerate(iter(partial(file.readline, READ_BYTES), b""), 1):
                try:
                    text = raw.decode()
                    if is_json and text.strip():
                        text = json.loads(text)[text_field]
                        if not isinstance(text, str):
                            raise TypeError(f"no text under {text_field!r}")
                        text.encode()
                # UnicodeError and what json raises are ValueErrors.
                except (ValueError, KeyError, TypeError, RecursionError) as fault:
                    refused.append(f"{path}:{number}: {type(fault).__name__}: {fault}")
                    continue
                yield from text.splitlines()


def _train_model(lines: Iterator[str], pieces: int) -> bytes:
    sink = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=lines,
            model_writer=sink,
            model_type="bpe",
            vocab_size=pieces,
            byte_fallback=True,
            split_digits=True,
            allow_whitespace_only_pieces=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            # It is written into the model: the bytes must not depend on the machine.
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as fault:
        raise TextTrainingError(_explained(str(fault), pieces)) from fault
    return sink.getvalue()


def _explained(fault: str, pieces: int) -> str:
    if found := re.search(r"too high \(\d+\).*<= (\d+)", fault):
        return (
            f"{pieces} pieces, but this text gives {found[1]} at the most: take fewer with --pieces, or give more text."
        )
    if found := re.search(r"required_chars.*?\d+ vs (\d+)", fault, re.S):
        return f"{pieces} pieces, but bytes and single characters alone are {found[1]}: take more with --pieces."
    return f"sentencepiece cannot train {pieces} pieces from this text: {fault}"


def _cut(line: str) -> Iterator[str]:
    """A line in parts of at most `LONGEST` characters, cut at spaces where there are any."""
    while len(line) > LONGEST:
        at = line.rfind(" ", LONGEST // 2, LONGEST)
        at = at if at > 0 else LONGEST
        yield line[:at]
        line = line[at:]
    yield line


def _fraction(text: str) -> float:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") / 2**64


def card_text(card: dict[str, Any]) -> str:
    """The card for people, from the card for programs."""
    figures = card["held_out"]
    names = {
        "bytes_per_piece": "bytes a piece",
        "pieces_per_word": "pieces a word",
        "byte_pieces": "share of pieces that are single bytes",
        "unknown": "share of unknown pieces",
        "round_trip": "share of lines that come back as they were",
        "pieces_used": "different pieces used",
    }
    lines = [
        f"# Text tokenizer `{card['name']}`",
        "",
        f"SentencePiece, byte-pair encoding with byte fallback, {card['pieces']:,} pieces.",
        "",
        f"sha256 of the model: `{card['sha256']}`",
        "",
        f"Trained on: {card['data']}. Licence of the data: {card['data_licence']}. {card['trained_on']['lines']:,} lines, "
        f"{card['trained_on']['bytes'] / 1e6:.1f} MB, drawn from {card['files']:,} files of {card['data_bytes'] / 1e6:.1f} "
        f"MB with seed {card['seed']}; {card['left_out']:,} lines were no text.",
        "",
        "## On held-out lines",
        "",
        f"{figures['texts']:,} lines, {figures['bytes'] / 1e3:.1f} kB, chosen by a hash of their content.",
        "",
        "| | |",
        "|---|---|",
        *(f"| {name} | {figures[key]:,} |" for key, name in names.items()),
        "",
        f"Made with {card['software']}.",
        "",
    ]
    return "\n".join([*lines, *([f"    {card['command']}", ""] if card["command"] else [])])

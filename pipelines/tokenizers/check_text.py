"""The sheet of a text tokenizer: how it cuts texts, what it cannot bring back, which pieces it uses."""

from __future__ import annotations

import random
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from pipelines.report.charts import Line, line_chart
from pipelines.report.frame import Section
from pipelines.report.markup import Markup, join, table, tag
from pipelines.report.parts import coverage_chart, key_figures, section
from pipelines.tokenizers.sentencepiece import TextTokenizer
from pipelines.tokenizers.sheet import CheckError, Request, spread
from pipelines.tokenizers.text_evaluation import evaluate
from pipelines.tokenizers.train_text import TextTrainingError, read_lines, text_files

SHOWN_CHARACTERS = 400
SPELLINGS = 40


def sections(request: Request) -> tuple[str, str, list[Section]]:
    """Title, subtitle and sections of the sheet."""
    tokenizer = TextTokenizer.load(request.tokenizer)
    refused: list[str] = []
    lines, found = _lines(request, refused)
    encoded = tokenizer.encode(lines)
    counts = np.bincount(np.concatenate(encoded), minlength=tokenizer.pieces)
    subtitle = (
        f"text tokenizer · SentencePiece · {tokenizer.pieces:,} pieces · {len(lines):,} of {found:,} lines of "
        f"{request.data.name}"
    )
    made = [
        section("figures", "Figures", _figures(tokenizer, lines, refused)),
        section("pieces", "Pieces", _pieces(tokenizer, counts)),
        section("texts", "Texts, cut into pieces", _shown(tokenizer, lines, request.items)),
    ]
    lost = [line for line, ids in zip(lines, encoded, strict=True) if tokenizer.decode(ids) != line]
    if lost:
        made.append(section("lost", "Texts that do not come back", _lost(tokenizer, lost, request.items)))
    return tokenizer.name, subtitle, made


def _lines(request: Request, refused: list[str]) -> tuple[list[str], int]:
    """Lines to look at, drawn from all with a fixed seed, in their order; and how many there are."""
    try:
        files = text_files([request.data])
    except TextTrainingError as fault:
        raise CheckError(str(fault)) from fault
    # A reservoir: which lines are kept is known at the end alone, and no more than these are held.
    kept: list[tuple[int, str]] = []
    draw = random.Random(0)
    found = 0
    for line in _told(read_lines(files, "text", refused)):
        found += 1
        if len(kept) < request.limit:
            kept.append((found, line))
        elif (place := draw.randrange(found)) < request.limit:
            kept[place] = (found, line)
    if not kept:
        why = f"; {refused[0]}" if refused else ""
        raise CheckError(f"{request.data}: no line of text in {len(files):,} files{why}")
    return [line for _, line in sorted(kept)], found


def _told(lines: Iterator[str]) -> Iterator[str]:
    return (line for line in lines if line.strip())


def _figures(tokenizer: TextTokenizer, lines: list[str], refused: list[str]) -> Markup:
    figures = evaluate(tokenizer, lines)
    rows = [
        ("lines", f"{figures['texts']:,}"),
        ("bytes", f"{figures['bytes']:,}"),
        ("pieces", f"{figures['pieces']:,}"),
        ("pieces a word", f"{figures['pieces_per_word']:.3f}"),
        ("pieces that are single bytes", f"{figures['byte_pieces']:.3%}"),
        ("unknown pieces", f"{figures['unknown']:.3%}"),
        ("lines that come back as they were", f"{figures['round_trip']:.3%}"),
        ("long texts are cut for speed", "yes" if tokenizer.divisible else "no"),
    ]
    left_out = f"Left out: {len(refused):,} lines, the first: {refused[0]}" if refused else None
    return join(
        [
            key_figures(
                (f"{figures['bytes_per_piece']:.2f}", "bytes a piece; more is shorter"),
                (f"{figures['round_trip']:.2%}", "of the lines come back as they were"),
                (f"{figures['unknown']:.2%}", "of the pieces are unknown"),
                (f"{figures['pieces_used']:,}", f"of {tokenizer.pieces:,} pieces used"),
            ),
            table("Over the lines", ("", ""), rows),
            tag("p", left_out, class_="note") if left_out else None,
        ]
    )


def _pieces(tokenizer: TextTokenizer, counts: NDArray[np.int64]) -> Markup:
    processor = tokenizer.processor
    ordinary = [
        i
        for i in range(tokenizer.pieces)
        if not (processor.is_control(i) or processor.is_unknown(i) or processor.is_byte(i))
    ]
    spelled = {i: _spelled(processor.id_to_piece(i)) for i in ordinary}
    by_length = sorted(ordinary, key=lambda i: (-len(spelled[i]), i))
    used = [i for i in by_length if counts[i]]
    most = sorted(used, key=lambda i: (-int(counts[i]), i))
    charts = [
        coverage_chart("coverage", "What the most used pieces cover", [("pieces", counts)], tone="text", what="pieces"),
        _lengths([len(spelled[i]) for i in ordinary], [len(spelled[i]) for i in used]),
    ]
    lists = [
        ("Most used", most),
        ("Longest in use", used),
        ("Longest of all", [] if by_length[:SPELLINGS] == used[:SPELLINGS] else by_length),
        ("Not used in these lines, the first of them", [i for i in ordinary if not counts[i]]),
    ]
    shown = [
        part
        for title, ids in lists
        if ids
        for part in (
            tag("h3", title),
            tag(
                "p",
                *(part for i in ids[:SPELLINGS] for part in (tag("span", spelled[i].replace(" ", "·")), " ")),
                class_="spellings",
            ),
        )
    ]
    return join([tag("div", *charts, class_="panels"), *shown])


def _lengths(vocabulary: list[int], used: list[int]) -> Markup:
    title = "Length of the pieces"
    longest = max(vocabulary)

    def shares(lengths: list[int]) -> list[tuple[float, float]]:
        counts = np.bincount(lengths, minlength=longest + 1)
        return [(float(n), float(100 * counts[n] / max(len(lengths), 1))) for n in range(1, longest + 1)]

    lines = [
        Line(name="in the vocabulary", points=shares(vocabulary), style="reference", label="all"),
        Line(name="in use", points=shares(used), style="", label="used"),
    ]
    means = f"{np.mean(vocabulary):.1f} characters in the mean, those in use {np.mean(used):.1f}"
    said = f"Pieces have {means}; the longest has {longest}."
    chart = line_chart(
        "lengths", title, said, lines, y_label="% of the pieces", x_label="characters", tone="text", from_zero=True
    )
    note = tag("span", "dashed: all of the vocabulary; line: those in use", class_="note")
    return tag("figure", tag("figcaption", tag("strong", title), note), chart, class_="panel")


def _shown(tokenizer: TextTokenizer, lines: list[str], items: int) -> Markup:
    cards = []
    for line in spread(lines, items):
        text = line[:SHOWN_CHARACTERS]
        ids = tokenizer.encode([text])[0].tolist()
        told = (
            f"{len(text):,} characters, {len(ids):,} pieces, {len(text.encode()) / max(len(ids), 1):.2f} bytes a piece"
        )
        cut = f"; the first {SHOWN_CHARACTERS} of {len(line):,} characters" if len(line) > len(text) else ""
        cards.append(
            tag("figure", _cut_up(tokenizer, ids), tag("figcaption", told + cut, class_="settings"), class_="card")
        )
    return tag("div", *cards, class_="cards wide")


def _lost(tokenizer: TextTokenizer, lost: list[str], items: int) -> Markup:
    rows = []
    for line in lost[:items]:
        back = tokenizer.decode(tokenizer.encode([line])[0])
        at = next((i for i, (a, b) in enumerate(zip(line, back, strict=False)) if a != b), min(len(line), len(back)))
        around = slice(max(at - 12, 0), at + 12)
        rows.append((repr(line[around]), repr(back[around])))
    return join(
        [
            tag("p", f"{len(lost):,} lines; where the first of them differ:", class_="note"),
            table("Around the first difference", ("the text", "what comes back"), rows),
        ]
    )


def _cut_up(tokenizer: TextTokenizer, ids: list[int]) -> Markup:
    processor = tokenizer.processor
    pieces = []
    for i in ids:
        style = "byte" if processor.is_byte(i) else "unknown" if processor.is_unknown(i) else None
        pieces.append(tag("span", _spelled(processor.id_to_piece(i)), class_=style))
    return tag("p", *pieces, class_="pieces", dir="auto")


def _spelled(piece: str) -> str:
    """A piece as it stands in a text; `<0x0A>` is a byte."""
    return piece.replace("\u2581", " ")

"""The sheet of an audio tokenizer: sounds to hear and to see beside what is left of them."""

from __future__ import annotations

import io
import math

import numpy as np
import soundfile
from PIL import Image

from pipelines.corpus.errors import MediaError
from pipelines.corpus.sounds import load_sound
from pipelines.report.frame import Section
from pipelines.report.markup import Markup, join, table, tag
from pipelines.report.media import data_uri
from pipelines.report.parts import coverage_chart, key_figures, section
from pipelines.tokenizers.audio_data import SUFFIXES
from pipelines.tokenizers.audio_evaluation import codebook_use, compare, depths_of, log_mel_db, means, require_estoi
from pipelines.tokenizers.encodec import AudioTokenizer
from pipelines.tokenizers.sheet import CheckError, Request, spread

LONGEST_S, SHOWN_S = 30.0, 4.0
"""Of a clip, at most: what is measured, and what is on the sheet."""
FLOOR_DB = -80.0
_RAMP = np.array([(10, 14, 20), (14, 52, 56), (18, 110, 88), (96, 186, 128), (214, 232, 150), (255, 252, 235)])
"""Colours from silence to full scale."""

Rows = list[dict[str, float]]


def sections(request: Request) -> tuple[str, str, list[Section]]:
    """Title, subtitle and sections of the sheet."""
    require_estoi()
    tokenizer = AudioTokenizer.load(request.tokenizer, device=request.device)
    names, clips, refused, found = _sounds(request, tokenizer)
    codes = tokenizer.encode(clips)
    by_depth: dict[int, Rows] = {}
    for done, depth in enumerate(depths_of(tokenizer), 1):
        by_depth[depth] = compare(tokenizer, clips, codes, depth)
        request.watch("decoding and measuring", done, len(depths_of(tokenizer)))
    seconds = sum(map(len, clips)) / tokenizer.sample_rate_hz
    subtitle = (
        f"audio tokenizer · {tokenizer.sample_rate_hz:,} Hz · {tokenizer.frame_rate_hz:g} frames a second · "
        f"{tokenizer.n_q} codebooks of {tokenizer.codebook_size:,} · {len(clips):,} of {found:,} sounds of "
        f"{request.data.name}, {seconds:.0f} s"
    )
    made = [
        section("figures", "Figures", _figures(tokenizer, by_depth, refused)),
        section("codes", "Use of the codebooks", _codes(tokenizer, np.concatenate(codes))),
        section("sounds", "Sounds", _shown(tokenizer, names, clips, codes, by_depth, request.items)),
    ]
    return tokenizer.name, subtitle, made


def _sounds(request: Request, tokenizer: AudioTokenizer) -> tuple[list[str], list[np.ndarray], list[str], int]:
    """Names and waveforms of the sounds to hear, why others were left out, and how many files there are."""
    root = request.data
    paths = sorted(p for p in root.rglob("*") if p.suffix.lower() in SUFFIXES) if root.is_dir() else [root]
    names, clips, refused = [], [], []
    chosen = spread(paths, request.limit)
    for done, path in enumerate(chosen, 1):
        name = path.relative_to(root).as_posix() if path != root else path.name
        try:
            clips.append(
                load_sound(path.read_bytes(), name, tokenizer.sample_rate_hz)[: _samples(tokenizer, LONGEST_S)]
            )
            names.append(name)
        except MediaError as fault:
            refused.append(str(fault))
        request.watch("reading", done, len(chosen))
    if not clips:
        why = f"; {refused[0]}" if refused else ""
        raise CheckError(f"{root}: none of {len(paths):,} sound files can be heard ({', '.join(SUFFIXES)}){why}")
    return names, clips, refused, len(paths)


def _samples(tokenizer: AudioTokenizer, seconds: float) -> int:
    return int(seconds * tokenizer.sample_rate_hz)


def _figures(tokenizer: AudioTokenizer, by_depth: dict[int, Rows], refused: list[str]) -> Markup:
    bits = math.log2(tokenizer.codebook_size) * tokenizer.frame_rate_hz / 1000
    figures = {depth: means(rows) for depth, rows in by_depth.items()}
    best = figures[tokenizer.n_q]
    rows = [
        (
            f"{depth}",
            f"{bits * depth:g}",
            _number(row["estoi"], ".3f"),
            f"{row['mel_distance_db']:.2f}",
            f"{row['si_sdr_db']:.2f}",
            f"{depth * tokenizer.frame_rate_hz:g}",
        )
        for depth, row in figures.items()
    ]
    left_out = f" Left out: {len(refused):,} files, the first: {refused[0]}" if refused else ""
    note = (
        f"ESTOI, from 0 to 1, says how intelligible speech stays; it is over the {best['estoi_clips']:,} sounds with at "
        "least 0.4 s of what could be speech, and means little for music. Mel distance is the mean difference of 80-band "
        f"spectra. Of each sound the first {LONGEST_S:g} s count.{left_out}"
    )
    return join(
        [
            key_figures(
                (_number(best["estoi"], ".3f"), f"ESTOI with all {tokenizer.n_q} codebooks"),
                (f"{best['mel_distance_db']:.2f} dB", "mel distance, 0 is alike"),
                (f"{best['si_sdr_db']:.1f} dB", "SI-SDR, the signal over the error"),
                (f"{bits * tokenizer.n_q:g} kbit/s", f"{tokenizer.n_q * tokenizer.frame_rate_hz:g} tokens a second"),
            ),
            table(
                "By the number of codebooks",
                ("codebooks", "kbit/s", "ESTOI", "mel distance, dB", "SI-SDR, dB", "tokens a second"),
                rows,
            ),
            tag("p", note, class_="note"),
        ]
    )


def _codes(tokenizer: AudioTokenizer, codes: np.ndarray) -> Markup:
    size = tokenizer.codebook_size
    use = codebook_use(codes, size)
    counts = [(str(q), np.bincount(column, minlength=size)) for q, column in enumerate(codes.T)]
    rows = [
        (
            f"{q}{' (loudness)' if tokenizer.config.normalize and not q else ''}",
            f"{book['used']:,}",
            f"{size - book['used']:,}",
            f"{book['perplexity']:,.1f}",
            f"{used.max() / used.sum():.1%}",
        )
        for q, (book, (_, used)) in enumerate(zip(use, counts, strict=True))
    ]
    few = len(codes) < 20 * size
    note = "Few sounds leave codes unused that are not dead: give more with --limit." if few else ""
    shown = [counts[place] for place in spread(range(len(counts)), 8)]
    chart = coverage_chart("coverage", "What the most used codes of each codebook cover", shown, tone="audio")
    header = ("codebook", "used", "dead here", "perplexity", "largest share")
    return join(
        [
            tag("div", chart, table(f"Codes of {len(codes):,} frames", header, rows), class_="panels"),
            tag("p", note, class_="note") if note else None,
        ]
    )


def _shown(
    tokenizer: AudioTokenizer,
    names: list[str],
    clips: list[np.ndarray],
    codes: list[np.ndarray],
    by_depth: dict[int, Rows],
    items: int,
) -> Markup:
    distance = [row["mel_distance_db"] for row in by_depth[tokenizer.n_q]]
    order = sorted(range(len(names)), key=lambda index: -distance[index])
    cards = []
    for index in spread(order, items):
        end = _samples(tokenizer, SHOWN_S)
        clip = clips[index][:end]
        takes = [
            _take("original", [f"{len(clips[index]) / tokenizer.sample_rate_hz:.2f} s"], clip, tokenizer, names[index])
        ]
        for depth in spread(list(by_depth), 3):
            row = by_depth[depth][index]
            said = [
                f"ESTOI {_number(row['estoi'], '.3f')}",
                f"mel {row['mel_distance_db']:.2f} dB",
                f"SI-SDR {row['si_sdr_db']:.1f} dB",
            ]
            # Of the whole clip: a codec hears what came before, and segments have a loudness of their own.
            decoded = tokenizer.decode(codes[index][:, :depth])[: len(clip)]
            label = f"{depth} codebook{'s' * (depth > 1)}"
            takes.append(_take(label, said, decoded, tokenizer, names[index]))
        cut = f", the first {SHOWN_S:g} s of it" if len(clips[index]) > end else ""
        cards.append(tag("figure", *takes, tag("figcaption", f"{names[index]}{cut}", class_="settings"), class_="card"))
    return join(
        [
            tag("p", "From the largest mel distance to the least, evenly chosen.", class_="note"),
            tag("div", *cards, class_="cards takes"),
        ]
    )


def _take(label: str, said: list[str], waveform: np.ndarray, tokenizer: AudioTokenizer, name: str) -> Markup:
    sink = io.BytesIO()
    soundfile.write(sink, waveform.clip(-1, 1), tokenizer.sample_rate_hz, format="WAV", subtype="PCM_16")
    picture = tag(
        "img",
        src=data_uri("image/png", spectrogram(waveform, tokenizer.sample_rate_hz)),
        alt=f"Mel spectrogram of {name}, {label}",
        loading="lazy",
    )
    player = tag(
        "audio",
        controls=True,
        preload="metadata",
        src=data_uri("audio/wav", sink.getvalue()),
        aria_label=f"{name}, {label}",
    )
    told = tag("span", tag("b", label), *(tag("span", line) for line in said))
    return tag("div", told, picture, player, class_="take")


def spectrogram(waveform: np.ndarray, sample_rate_hz: int) -> bytes:
    """A PNG of the mel spectrum, low tones at the bottom; float32 [samples]."""
    share = (log_mel_db(waveform, sample_rate_hz)[::-1] / -FLOOR_DB + 1).clip(0, 1)
    steps = np.linspace(0, 1, len(_RAMP))
    pixels = np.stack([np.interp(share, steps, _RAMP[:, channel]) for channel in range(3)], axis=2)
    sink = io.BytesIO()
    Image.fromarray(pixels.round().astype(np.uint8)).save(sink, format="PNG", optimize=True)
    return sink.getvalue()


def _number(value: float, form: str) -> str:
    return "-" if math.isnan(value) else f"{value:{form}}"

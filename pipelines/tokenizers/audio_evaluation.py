"""How good an audio tokenizer is on held-out clips, and the card that says so.

Enters: a tokenizer and held-out sounds. Leaves: figures for each number of codebooks, `card.md`, `card.json`, a picture
of mel spectrograms and a WAV in which originals and reconstructions follow one another.

ESTOI (Jensen and Taal, 2016) estimates how intelligible speech stays, from 0 to 1; it needs 0.4 s of speech, so shorter clips
do not count in it. Mel distance is the mean absolute difference of 80-band log-mel spectra in dB.
"""

from __future__ import annotations

import importlib
import json
import math
import warnings
import wave
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipelines.tokenizers.audio_codec import Codec
from pipelines.tokenizers.audio_data import Sounds
from pipelines.tokenizers.audio_losses import mel_filters
from pipelines.tokenizers.encodec import AudioTokenizer

MEL_WINDOW, MEL_BANDS = 1024, 80
DEPTHS = (1, 2, 4, 8)
CLIPS = 120
SHOWN = 4
CONTINUOUS_CLIPS, CONTINUOUS_SECONDS = 16, 2


def require_estoi() -> None:
    """Fail at once, not after the training, where pystoi is missing.

    Raises:
        ImportError: pystoi is not installed.
    """
    try:
        importlib.import_module("pystoi")
    except ModuleNotFoundError as fault:
        raise ImportError(
            "evaluating an audio tokenizer needs pystoi: `make venv`, or `pip install pystoi==0.4.1`."
        ) from fault


def evaluate(tokenizer: AudioTokenizer, sounds: Sounds, paths: Sequence[str], clips: int = CLIPS) -> dict[str, Any]:
    """Measure reconstructions of held-out clips with 1, 2, 4 and 8 codebooks, as far as the tokenizer has them.

    Args:
        tokenizer: On any device.
        sounds: Holds the clips.
        paths: Held-out clips; the first `clips` of them are used.

    Returns:
        `clips`, `seconds`, `by_n_q` (figures for each depth), `by_source` (the same at half the codebooks, for each first two
        parts of a path), `codebooks` (entries used and perplexity, over all codes).
    """
    paths = list(paths[:clips])
    if not paths:
        raise ValueError("no held-out clip to evaluate on: give more sounds, or another prefix of speech.")
    originals = [sounds.waveform(path) for path in paths]
    codes = tokenizer.encode(originals)
    by_n_q: dict[str, dict[str, float]] = {}
    by_source: dict[str, dict[str, float]] = {}
    for depth in depths_of(tokenizer):
        rows = compare(tokenizer, originals, codes, depth)
        by_n_q[str(depth)] = means(rows)
        if depth == max(tokenizer.least_n_q, tokenizer.n_q // 2):
            sources = ["/".join(path.split("/")[:2]) if "/" in path else "all" for path in paths]
            for source in sorted(set(sources)):
                by_source[source] = means([row for row, own in zip(rows, sources, strict=True) if own == source])
    return {
        "clips": len(paths),
        "seconds": round(sum(map(len, originals)) / tokenizer.sample_rate_hz, 1),
        "by_n_q": by_n_q,
        "by_source": by_source,
        "codebooks": codebook_use(np.concatenate(codes), tokenizer.codebook_size),
    }


def depths_of(tokenizer: AudioTokenizer) -> list[int]:
    """Numbers of codebooks that are measured."""
    return sorted({depth for depth in DEPTHS if tokenizer.least_n_q <= depth <= tokenizer.n_q} | {tokenizer.n_q})


def compare(
    tokenizer: AudioTokenizer, originals: Sequence[np.ndarray], codes: Sequence[np.ndarray], depth: int
) -> list[dict[str, float]]:
    """ESTOI (NaN where there is too little speech), mel distance and SI-SDR of each clip with its first codebooks."""
    decoded = tokenizer.decode_batch([clip[:, :depth] for clip in codes])
    return [
        figures_of(original, copy[: len(original)], tokenizer.sample_rate_hz)
        for original, copy in zip(originals, decoded, strict=True)
    ]


def estoi(original: np.ndarray, decoded: np.ndarray, sample_rate_hz: int) -> float:
    """Extended short-time objective intelligibility, float32 [samples] each; NaN where there is too little speech."""
    from pystoi import stoi

    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        try:
            return float(stoi(original, decoded, sample_rate_hz, extended=True))
        except RuntimeWarning:
            # pystoi warns and returns a placeholder when fewer than 30 frames hold speech.
            return math.nan


@torch.no_grad()
def continuous_estoi(codec: Codec, sounds: Sounds, paths: Sequence[str]) -> tuple[float, int]:
    """Mean ESTOI of an autoencoder without its codebooks, and over how many clips: better, no codebook can make it."""
    device, length = next(codec.parameters()).device, CONTINUOUS_SECONDS * sounds.sample_rate_hz
    figures = []
    # One length for all: in training, convolution algorithms are chosen by timing, once for each length.
    for path in paths[:CONTINUOUS_CLIPS]:
        original = sounds.waveform(path)[:length]
        padded = torch.from_numpy(np.pad(original, (0, length - len(original))))[None, None]
        decoded = codec.decode(codec.encode(padded.to(device)))[0, 0, : len(original)].cpu().numpy()
        figures.append(estoi(original, decoded, sounds.sample_rate_hz))
    held = [figure for figure in figures if not math.isnan(figure)]
    return float(np.mean(held)) if held else math.nan, len(held)


def si_sdr_db(original: np.ndarray, decoded: np.ndarray) -> float:
    """Scale-invariant signal-to-distortion ratio in dB (Le Roux et al., 2019)."""
    target = original * (np.dot(decoded, original) / max(np.dot(original, original), 1e-9))
    noise = decoded - target
    return 10.0 * math.log10(max(float(np.dot(target, target)), 1e-9) / max(float(np.dot(noise, noise)), 1e-9))


def log_mel_db(waveform: np.ndarray, sample_rate_hz: int) -> np.ndarray:
    """80-band mel spectrum in dB of full scale, not below -80: float32 [samples] -> float32 [80, frames]."""
    samples = torch.from_numpy(waveform)
    if len(samples) < MEL_WINDOW:
        samples = torch.nn.functional.pad(samples, (0, MEL_WINDOW - len(samples)))
    window = torch.hann_window(MEL_WINDOW)
    spectrum = torch.stft(samples, MEL_WINDOW, MEL_WINDOW // 4, window=window, return_complex=True).abs()
    mel = mel_filters(sample_rate_hz, MEL_WINDOW, MEL_BANDS) @ (spectrum / window.square().sum().sqrt())
    decibels: np.ndarray = (20.0 * torch.log10(mel.clamp_min(1e-4))).numpy()
    return decibels


def figures_of(original: np.ndarray, decoded: np.ndarray, sample_rate_hz: int) -> dict[str, float]:
    """The figures of one clip, float32 [samples] each."""
    distance = np.abs(log_mel_db(original, sample_rate_hz) - log_mel_db(decoded, sample_rate_hz)).mean()
    return {
        "estoi": estoi(original, decoded, sample_rate_hz),
        "mel_distance_db": float(distance),
        "si_sdr_db": si_sdr_db(original, decoded),
    }


def means(rows: Sequence[dict[str, float]]) -> dict[str, float]:
    """Means over clips, and over how many of them ESTOI could be taken."""
    found = {}
    for name in rows[0]:
        values = [row[name] for row in rows if not math.isnan(row[name])]
        found[name] = round(float(np.mean(values)), 3) if values else math.nan
    return {**found, "estoi_clips": sum(not math.isnan(row["estoi"]) for row in rows)}


def codebook_use(codes: np.ndarray, codebook_size: int) -> list[dict[str, float]]:
    """Entries used and perplexity of each codebook, from int32 [frames, K]."""
    use = []
    for column in codes.T:
        shares = np.bincount(column, minlength=codebook_size) / len(column)
        held = shares[shares > 0]
        use.append({"used": len(held), "perplexity": round(float(np.exp(-(held * np.log(held)).sum())), 1)})
    return use


def write_samples(tokenizer: AudioTokenizer, sounds: Sounds, paths: Sequence[str], folder: Path) -> None:
    """Write `samples.png` (mel spectrograms, originals above reconstructions) and `samples.wav` (the same, to listen to)."""
    from matplotlib.figure import Figure

    rate, depths = tokenizer.sample_rate_hz, [depth for depth in depths_of(tokenizer) if depth >= tokenizer.n_q // 2]
    longest = sorted(paths[:40], key=lambda path: -len(sounds.clips[path]))
    shown = longest[:: max(1, len(longest) // SHOWN)][:SHOWN]
    figure = Figure(figsize=(4 * len(shown), 2.2 * (1 + len(depths))), layout="constrained")
    axes = figure.subplots(1 + len(depths), len(shown), squeeze=False)
    pause, listening = np.zeros(rate // 2, np.float32), []
    for column, path in enumerate(shown):
        original = sounds.waveform(path)[: 5 * rate]
        codes = tokenizer.encode([original])[0]
        rows = [("original", original)]
        rows += [(f"{depth} codebooks", tokenizer.decode(codes[:, :depth])[: len(original)]) for depth in depths]
        for row, (label, waveform) in enumerate(rows):
            axis = axes[row][column]
            axis.imshow(log_mel_db(waveform, rate), origin="lower", aspect="auto", vmin=-80, vmax=0, cmap="magma")
            axis.set_xticks([])
            axis.set_yticks([])
            if row == 0:
                axis.set_title(path[-40:], fontsize=7)
            if column == 0:
                axis.set_ylabel(label)
            listening += [waveform, pause]
    figure.savefig(folder / "samples.png", dpi=80)
    with wave.open(str(folder / "samples.wav"), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(np.round(np.concatenate(listening).clip(-1, 1) * 32767).astype("<i2").tobytes())


def write_card(
    folder: Path, tokenizer: AudioTokenizer, figures: dict[str, Any], run: dict[str, Any], about: str
) -> None:
    """Write `card.json` (all figures) and `card.md` (what a reader wants first)."""
    parameters = sum(tensor.numel() for tensor in tokenizer.network.weights().values())
    facts = {
        "name": tokenizer.name,
        "kind": "audio",
        "sha256": tokenizer.sha256,
        "parameters": parameters,
        "bytes": (folder / "weights.safetensors").stat().st_size,
        "sample_rate_hz": tokenizer.sample_rate_hz,
        "frame_rate_hz": tokenizer.frame_rate_hz,
        "n_q": tokenizer.n_q,
        "codebook_size": tokenizer.codebook_size,
        "held_out": figures,
        "training": run,
    }
    (folder / "card.json").write_text(json.dumps(facts, indent=2, default=str) + "\n", encoding="utf-8")
    bits = math.log2(tokenizer.codebook_size) * tokenizer.frame_rate_hz / 1000
    use = figures["codebooks"]
    lines = [
        f"# Audio tokenizer `{tokenizer.name}`",
        "",
        f"EnCodec, {tokenizer.sample_rate_hz} Hz mono, {tokenizer.frame_rate_hz:g} frames a second, {tokenizer.n_q} "
        f"codebooks of {tokenizer.codebook_size}, causal, {parameters / 1e6:.1f} M parameters. Trained so that the first "
        "codebooks stand alone.",
        "",
        f"sha256 of config and weights: `{tokenizer.sha256}`",
        "",
        "## Held-out speech",
        "",
        f"{figures['clips']} clips, {figures['seconds']} s, chosen by a hash of their paths and never trained on. "
        f"ESTOI is over the {figures['by_n_q'][str(tokenizer.n_q)]['estoi_clips']} clips that hold at least 0.4 s of speech.",
        "",
        "| codebooks | kbit/s | ESTOI | mel distance, dB | SI-SDR, dB |",
        "|---|---|---|---|---|",
        *(
            f"| {depth} | {bits * int(depth):g} | {row['estoi']:.3f} "
            f"| {row['mel_distance_db']:.2f} | {row['si_sdr_db']:.2f} |"
            for depth, row in figures["by_n_q"].items()
        ),
        "",
        f"With {max(1, tokenizer.n_q // 2)} codebooks, by source:",
        "",
        "| source | ESTOI | mel distance, dB | SI-SDR, dB |",
        "|---|---|---|---|",
        *(
            f"| {source} | {row['estoi']:.3f} | {row['mel_distance_db']:.2f} | {row['si_sdr_db']:.2f} |"
            for source, row in figures["by_source"].items()
        ),
        "",
        f"Entries used, by codebook: {', '.join(str(book['used']) for book in use)}; "
        f"perplexity: {', '.join(str(book['perplexity']) for book in use)}.",
        "",
        "## Training",
        "",
        f"    {run['command']}",
        "",
        f"{run['steps']} steps on {run['device']} with torch {run['torch']}; {run['data_minutes']} minutes of sound, "
        f"{run['training_clips']} clips to train on, {run['held_out_clips']} held out.",
        "",
        *([about.strip(), ""] if about else []),
    ]
    (folder / "card.md").write_text("\n".join(lines), encoding="utf-8")

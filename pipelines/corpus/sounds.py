"""Raw sound files to waveforms.

Enters: the bytes of one WAV, FLAC, OGG (Vorbis or Opus) or MP3 file. Leaves: mono float32 [samples] at the rate the audio
tokenizer wants. Always holds: every sample is finite, there is at least one, and the header's duration was checked before
anything was decoded. What cannot be a waveform raises `MediaError`. Decoding goes block by block, so that memory holds the
file, the waveform, and little else: see docs/preprocessing.md.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any

import numpy as np
import soundfile

from pipelines.corpus.errors import MediaError
from pipelines.corpus.sound_files import streams

SOUND_PREPROCESSING_VERSION = 2
"""Enters the fingerprint of every dataset: raise it whenever the same bytes would give another waveform."""

MAX_SECONDS = 3600.0
MAX_CHANNELS = 16
MIN_RATE_HZ, MAX_RATE_HZ = 1000, 1_000_000
"""A header beyond them is wrong: a second would have few samples, or the resampler a filter without end."""

FORMATS = frozenset({"WAV", "WAVEX", "FLAC", "OGG", "MP3"})


_BLOCK_SAMPLES = 2**18
"""Samples of all channels together that are decoded at once."""

_INT16_SCALE = np.float32(2**-15)

_UNKNOWN_FRAMES = 2**62
"""libsndfile's length of a FLAC file that does not say its own is about this."""

_UNKNOWN_FORMAT = 1
"""libsndfile's number of that error."""


def load_sound(
    data: bytes,
    uri: str,
    sample_rate_hz: int,
    max_seconds: float = MAX_SECONDS,
    loudness_db: float | None = None,
) -> np.ndarray:
    """Decode, mix to mono by averaging channels, resample.

    Args:
        data: The file's bytes. Several OGG or MP3 files put together into one are one sound.
        uri: Names the file in errors.
        sample_rate_hz: Of the result; soxr's very high quality does the resampling.
        max_seconds: A longer file is refused, by its header if that says so, before it is decoded.
        loudness_db: Scale to this RMS level, in dB of full scale (-23 is usual for speech), but never so far that a peak
            exceeds 1. None keeps the file's own level.

    Returns:
        float32 [samples], nominally in [-1, 1].

    Raises:
        MediaError: unknown format, truncated, empty, too long, too many channels, or samples that are not finite.
    """
    if not data:
        raise MediaError(f"{uri}: the file is empty (0 bytes). Remove it, or fetch it again.", "empty file")
    # Grows in place, where a list of blocks would stand twice in memory when it is joined.
    samples = bytearray()
    seconds = 0.0
    for stream in streams(data, uri):
        for block, duration in _blocks(stream, uri, sample_rate_hz, max_seconds, seconds):
            if not np.isfinite(block).all():
                raise MediaError(f"{uri}: holds samples that are NaN or infinite. Export the file again.", "not finite")
            samples += block.data
            seconds += duration
    waveform = np.frombuffer(samples, np.float32)
    if not len(waveform):
        if seconds:
            raise MediaError(
                f"{uri}: too short, nothing is left of it at {sample_rate_hz} Hz. Remove the file.", "empty"
            )
        raise MediaError(f"{uri}: the file holds no samples. Remove it, or fetch it again.", "no samples")
    if loudness_db is not None:
        waveform = normalise_loudness(waveform, loudness_db)
    return waveform


def normalise_loudness(waveform: np.ndarray, loudness_db: float) -> np.ndarray:
    """Scale float32 [samples] to an RMS of `loudness_db` dB of full scale, limited so that no peak exceeds 1.

    Silence stays silence. The rule is one gain for the whole clip: nothing is compressed.
    """
    squares, peak = 0.0, 0.0
    for start in range(0, len(waveform), _BLOCK_SAMPLES):
        block = waveform[start : start + _BLOCK_SAMPLES]
        squares += float(np.square(block, dtype=np.float64).sum())
        peak = max(peak, float(np.abs(block).max()))
    if peak == 0.0:
        return waveform
    gain = min(10.0 ** (loudness_db / 20.0) / float(np.sqrt(squares / len(waveform))), 1.0 / peak)
    return waveform * np.float32(gain)


def equal_parts(waveform: np.ndarray, hop: int, max_frames: int) -> list[np.ndarray]:
    """A waveform cut into the fewest parts of at most so many frames, of equal length up to a frame.

    Cut at the limit instead, the last part would be a tail of some frames, a span that says nothing.
    """
    frames = -(-len(waveform) // hop)
    count = -(-frames // max_frames)
    size = -(-frames // count) * hop
    return [waveform[start : start + size] for start in range(0, len(waveform), size)]


class _Forward(soundfile.SoundFile):
    """A file that is only read on: soundfile would seek to where it is after each block, and so jump over damage."""

    def seekable(self) -> bool:
        return False


def _blocks(
    data: bytes, uri: str, sample_rate_hz: int, max_seconds: float, before: float
) -> Iterator[tuple[np.ndarray, float]]:
    """The waveform of one stream, `before` seconds into the file, block by block, each with its own seconds."""
    try:
        with _Forward(io.BytesIO(data)) as file:
            _check_header(file, uri, max_seconds, before)
            rate_hz, resampler = file.samplerate, None
            if rate_hz != sample_rate_hz:
                import soxr

                resampler = soxr.ResampleStream(rate_hz, sample_rate_hz, 1, dtype="float32", quality="VHQ")
            decoded = 0
            size = _BLOCK_SAMPLES // file.channels
            # libsndfile scales by the same power of two, but one sample at a time.
            integers = file.subtype == "PCM_16"
            while len(samples := file.read(size, dtype="int16" if integers else "float32", always_2d=True)):
                if integers:
                    samples = samples * _INT16_SCALE
                # Finite numbers may add up to what is not; the caller looks.
                with np.errstate(over="ignore", invalid="ignore"):
                    mono = samples[:, 0] if file.channels == 1 else samples.mean(axis=1, dtype=np.float32)
                decoded += len(mono)
                if before + decoded / rate_hz > max_seconds:
                    raise _too_long(uri, f"over {max_seconds:g} s", max_seconds)
                yield (resampler.resample_chunk(mono) if resampler else mono), len(mono) / rate_hz
            if decoded < file.frames < _UNKNOWN_FRAMES:
                message = f"{uri}: truncated, {decoded} of {file.frames} samples could be decoded. Fetch it again."
                raise MediaError(message, "truncated")
            if resampler:
                yield resampler.resample_chunk(np.empty(0, np.float32), last=True), 0.0
    except soundfile.LibsndfileError as fault:
        # Its text would name the address of the file object.
        message = f"{uri}: no readable sound ({fault.error_string}). Supported are WAV, FLAC, OGG (Vorbis, Opus), MP3."
        unknown = fault.code == _UNKNOWN_FORMAT
        raise MediaError(message, "unknown format" if unknown else "damaged") from fault


def _check_header(file: Any, uri: str, max_seconds: float, before: float) -> None:
    if file.format not in FORMATS:
        message = f"{uri}: format {file.format} is not read here. Convert it to WAV, FLAC, OGG or MP3."
        raise MediaError(message, "unknown format")
    if file.channels > MAX_CHANNELS:
        message = f"{uri}: {file.channels} channels, at most {MAX_CHANNELS} are read. Mix it down first."
        raise MediaError(message, "too many channels")
    if not MIN_RATE_HZ <= file.samplerate <= MAX_RATE_HZ:
        message = (
            f"{uri}: {file.samplerate} Hz by its header, outside {MIN_RATE_HZ} to {MAX_RATE_HZ}. Correct the header."
        )
        raise MediaError(message, "sample rate")
    seconds = before + file.frames / file.samplerate
    if file.frames < _UNKNOWN_FRAMES and seconds > max_seconds:
        raise _too_long(uri, f"{seconds:.1f} s by its header", max_seconds)


def _too_long(uri: str, length: str, max_seconds: float) -> MediaError:
    return MediaError(f"{uri}: {length}, the limit is {max_seconds:g} s. Cut it first.", "too long")

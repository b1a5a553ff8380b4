"""Raw sound files to waveforms.

Enters: the bytes of one WAV, FLAC, OGG (Vorbis or Opus) or MP3 file. Leaves: mono float32 [samples] at the rate the audio
tokenizer wants. Always holds: every sample is finite, there is at least one, and the header's duration was checked before
anything was decoded. What cannot be a waveform raises `MediaError`.
"""

from __future__ import annotations

import io

import numpy as np
import soundfile

from pipelines.corpus.errors import MediaError

SOUND_PREPROCESSING_VERSION = 1
"""Enters the fingerprint of every dataset: raise it whenever the same bytes would give another waveform."""

MAX_SECONDS = 3600.0
MAX_CHANNELS = 16
FORMATS = frozenset({"WAV", "WAVEX", "FLAC", "OGG", "MP3"})


def load_sound(
    data: bytes,
    uri: str,
    sample_rate_hz: int,
    max_seconds: float = MAX_SECONDS,
    loudness_db: float | None = None,
) -> np.ndarray:
    """Decode, mix to mono by averaging channels, resample.

    Args:
        data: The file's bytes.
        uri: Names the file in errors.
        sample_rate_hz: Of the result; soxr's very high quality does the resampling.
        max_seconds: A longer file is refused by its header, before it is decoded.
        loudness_db: Scale to this RMS level, in dB of full scale (-23 is usual for speech), but never so far that a peak
            exceeds 1. None keeps the file's own level.

    Returns:
        float32 [samples], nominally in [-1, 1].

    Raises:
        MediaError: unknown format, truncated, empty, too long, too many channels, or samples that are not finite.
    """
    waveform, rate_hz = _decode(data, uri, max_seconds)
    if rate_hz != sample_rate_hz:
        import soxr

        waveform = soxr.resample(waveform, rate_hz, sample_rate_hz, quality="VHQ")
        if not len(waveform):
            raise MediaError(f"{uri}: too short, nothing is left of it at {sample_rate_hz} Hz. Remove the file.")
    if loudness_db is not None:
        waveform = normalise_loudness(waveform, loudness_db)
    return np.ascontiguousarray(waveform, dtype=np.float32)


def normalise_loudness(waveform: np.ndarray, loudness_db: float) -> np.ndarray:
    """Scale float32 [samples] to an RMS of `loudness_db` dB of full scale, limited so that no peak exceeds 1.

    Silence stays silence. The rule is one gain for the whole clip: nothing is compressed.
    """
    rms, peak = float(np.sqrt(np.mean(np.square(waveform, dtype=np.float64)))), float(np.abs(waveform).max())
    if peak == 0.0:
        return waveform
    gain = min(10.0 ** (loudness_db / 20.0) / rms, 1.0 / peak)
    return (waveform * np.float32(gain)).astype(np.float32)


def _decode(data: bytes, uri: str, max_seconds: float) -> tuple[np.ndarray, int]:
    if not data:
        raise MediaError(f"{uri}: the file is empty (0 bytes). Remove it, or fetch it again.")
    missing = _missing_end(data)
    if missing:
        raise MediaError(f"{uri}: truncated, {missing}. Fetch it again.")
    try:
        with soundfile.SoundFile(io.BytesIO(data)) as file:
            if file.format not in FORMATS:
                raise MediaError(f"{uri}: format {file.format} is not read here. Convert it to WAV, FLAC, OGG or MP3.")
            if file.channels > MAX_CHANNELS:
                raise MediaError(
                    f"{uri}: {file.channels} channels, at most {MAX_CHANNELS} are read. Mix it down first."
                )
            seconds = file.frames / file.samplerate
            if seconds > max_seconds:
                raise MediaError(f"{uri}: {seconds:.1f} s by its header, the limit is {max_seconds:g} s. Cut it first.")
            # One frame beyond the limit: a header may lie, and then the decoder must not run on.
            limit = int(max_seconds * file.samplerate) + 1
            samples = file.read(limit, dtype="float32", always_2d=True)
            announced, rate_hz = file.frames, file.samplerate
    except soundfile.LibsndfileError as fault:
        raise MediaError(
            f"{uri}: no readable sound ({fault}). Supported are WAV, FLAC, OGG (Vorbis, Opus), MP3."
        ) from fault
    if not len(samples):
        raise MediaError(f"{uri}: the file holds no samples. Remove it, or fetch it again.")
    if len(samples) < announced:
        raise MediaError(f"{uri}: truncated, {len(samples)} of {announced} samples could be decoded. Fetch it again.")
    if not np.isfinite(samples).all():
        raise MediaError(
            f"{uri}: {int((~np.isfinite(samples)).sum())} samples are NaN or infinite. Export the file again."
        )
    return samples.mean(axis=1, dtype=np.float32), int(rate_hz)


def _missing_end(data: bytes) -> str:
    """What shows that a WAV or OGG file was cut off; libsndfile would silently decode what is left. Empty when whole."""
    if data.startswith(b"RIFF") and len(data) >= 8:
        announced = int.from_bytes(data[4:8], "little") + 8
        # Programs that write to a pipe cannot know the size, and announce the largest instead.
        if len(data) < announced < 0x7FFF_0000:
            return f"{len(data)} of {announced} bytes are there"
    if data.startswith(b"OggS"):
        page = data[data.rfind(b"OggS") :]
        if len(page) < 27 or len(page) < 27 + page[26] or len(page) < 27 + page[26] + sum(page[27 : 27 + page[26]]):
            return "its last page is not complete"
        if not page[5] & 4:
            return "its last page does not end the stream"
    return ""

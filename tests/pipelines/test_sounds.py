"""Sound files become mono waveforms, or say why not."""

import io

import numpy as np
import pytest
import soundfile

from pipelines.corpus.errors import MediaError
from pipelines.corpus.sounds import load_sound, normalise_loudness

RATE = 16_000
FORMATS = [("WAV", "PCM_16"), ("WAV", "FLOAT"), ("FLAC", "PCM_16"), ("OGG", "VORBIS"), ("OGG", "OPUS"), ("MP3", None)]


def tone(hz: float, seconds: float = 0.5, rate: int = RATE) -> np.ndarray:
    return (0.4 * np.sin(2 * np.pi * hz * np.arange(round(seconds * rate)) / rate)).astype(np.float32)


def encoded(samples: np.ndarray, rate: int = RATE, file_format: str = "WAV", subtype: str | None = "FLOAT") -> bytes:
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format=file_format, subtype=subtype)
    return file.getvalue()


@pytest.mark.parametrize(("file_format", "subtype"), FORMATS)
def test_every_format_gives_back_the_tone_and_its_length(file_format: str, subtype: str | None) -> None:
    original = tone(440)
    waveform = load_sound(encoded(original, RATE, file_format, subtype), "a", RATE)
    assert waveform.dtype == np.float32
    assert len(waveform) == len(original)
    # Away from the edges, where lossy codecs fade in.
    assert np.corrcoef(waveform[2000:-2000], original[2000:-2000])[0, 1] > 0.99


@pytest.mark.parametrize("rate", [8_000, 22_050, 44_100, 48_000])
def test_resampling_keeps_pitch_level_and_duration(rate: int) -> None:
    waveform = load_sound(encoded(tone(440, 1.0, rate), rate), "a", RATE)
    assert abs(len(waveform) - RATE) <= 1
    middle = slice(2000, 14000)
    np.testing.assert_allclose(waveform[middle], tone(440, 1.0)[middle], atol=2e-3)


def test_what_lies_above_the_new_band_does_not_alias_into_it() -> None:
    waveform = load_sound(encoded(tone(11_000, 1.0, 44_100), 44_100), "a", RATE)
    assert np.abs(waveform[2000:-2000]).max() < 1e-3


def test_channels_are_averaged() -> None:
    left, right = tone(300), tone(500)
    waveform = load_sound(encoded(np.stack([left, right], axis=1)), "a", RATE)
    np.testing.assert_allclose(waveform, (left + right) / 2, atol=1e-6)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_samples_that_are_not_finite_are_refused(value: float) -> None:
    samples = tone(440)
    samples[100] = value
    with pytest.raises(MediaError, match=r"s3://b/x\.wav: holds samples that are NaN or infinite"):
        load_sound(encoded(samples), "s3://b/x.wav", RATE)


@pytest.mark.parametrize(("file_format", "subtype"), FORMATS)
@pytest.mark.parametrize("share", [0.9, 0.5, 0.05])
def test_a_truncated_file_is_refused(file_format: str, subtype: str | None, share: float) -> None:
    noise = np.random.default_rng(0).normal(0, 0.1, 2 * RATE).astype(np.float32)
    data = encoded(noise, RATE, file_format, subtype)
    with pytest.raises(MediaError, match="cut"):
        load_sound(data[: int(share * len(data))], "cut", RATE)


@pytest.mark.parametrize("data", [b"", b"hello world, this is text", b"RIFF\x24\x00\x00\x00WAVEfmt ", bytes(1000)])
def test_what_is_no_sound_is_refused(data: bytes) -> None:
    with pytest.raises(MediaError, match="odd"):
        load_sound(data, "odd", RATE)


def test_a_file_without_samples_is_refused() -> None:
    with pytest.raises(MediaError, match="no samples"):
        load_sound(encoded(np.zeros(0, np.float32)), "a", RATE)


def test_a_duration_bomb_is_refused_by_its_header() -> None:
    hour = encoded(np.zeros(3600 * 8000, np.int16), 8000, "FLAC", "PCM_16")
    assert len(hour) < 300_000
    with pytest.raises(MediaError, match=r"3600\.0 s by its header, the limit is 60 s"):
        load_sound(hour, "a", RATE, max_seconds=60)


def test_formats_beyond_the_known_ones_are_refused() -> None:
    with pytest.raises(MediaError, match="format AIFF"):
        load_sound(encoded(tone(440), RATE, "AIFF", "PCM_16"), "a", RATE)


def test_a_wav_written_to_a_pipe_is_whole() -> None:
    data = bytearray(encoded(tone(440), RATE, "WAV", "PCM_16"))
    data[4:8] = (0x7FFF_F024).to_bytes(4, "little")
    assert len(load_sound(bytes(data), "a", RATE)) == len(tone(440))


@pytest.mark.parametrize("level_db", [-40.0, -23.0])
def test_loudness_reaches_the_stated_level(level_db: float) -> None:
    waveform = load_sound(encoded(tone(440)), "a", RATE, loudness_db=level_db)
    assert 20 * np.log10(np.sqrt(np.mean(waveform**2))) == pytest.approx(level_db, abs=0.01)


def test_loudness_never_pushes_a_peak_beyond_full_scale_nor_wakes_silence() -> None:
    click = np.full(RATE, 1e-4, np.float32)
    click[50] = 0.5
    assert np.abs(normalise_loudness(click, -10.0)).max() == pytest.approx(1.0)
    assert not normalise_loudness(np.zeros(100, np.float32), -23.0).any()


@pytest.mark.parametrize("file_format", ["WAV", "FLAC"])
@pytest.mark.parametrize("channels", [1, 2])
def test_samples_of_16_bits_are_those_that_libsndfile_makes_of_them(file_format: str, channels: int) -> None:
    samples = np.random.default_rng(0).integers(-(2**15), 2**15, (5000, channels), dtype=np.int16)
    samples[:2] = [[-(2**15)] * channels, [2**15 - 1] * channels]
    file = io.BytesIO()
    soundfile.write(file, samples, RATE, subtype="PCM_16", format=file_format)
    floats, _ = soundfile.read(io.BytesIO(file.getvalue()), dtype="float32", always_2d=True)
    expected = floats.mean(axis=1, dtype=np.float32)
    assert np.array_equal(load_sound(file.getvalue(), "x", RATE), expected)

"""Sound files that decoders read wrongly when left alone: of several streams, without a length, cut off."""

import io
import itertools

import numpy as np
import pytest
import soundfile
import soxr
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.corpus import sounds
from pipelines.corpus.errors import MediaError
from pipelines.corpus.sound_files import _LIKE_A_HEADER, _after_tags, _frame, streams
from pipelines.corpus.sounds import equal_parts, load_sound, normalise_loudness

RATE = 16_000


def clip(seconds: float, seed: int, rate: int = RATE) -> np.ndarray:
    """Silence, then noise, then a tone: encoders spend a different bitrate on each."""
    count = int(seconds * rate / 3)
    noise = np.random.default_rng(seed).normal(0, 0.1, count)
    return np.concatenate([np.zeros(count), noise, 0.3 * np.sin(np.arange(count) * 0.1)]).astype(np.float32)


def encoded(samples: np.ndarray, kind: str, subtype: str | None = None, rate: int = RATE, **how: object) -> bytes:
    file = io.BytesIO()
    channels = samples.shape[1] if samples.ndim == 2 else 1
    with soundfile.SoundFile(file, "w", rate, channels, format=kind, subtype=subtype, **how) as out:  # type: ignore[arg-type]
        out.write(samples)
    return file.getvalue()


def mp3(samples: np.ndarray, rate: int = RATE, mode: str = "VARIABLE") -> bytes:
    return encoded(samples, "MP3", rate=rate, bitrate_mode=mode, compression_level=0.5)


def without_tag(data: bytes) -> bytes:
    """An MP3 file as an old encoder or a radio stream leaves it: without the frame that says how many follow."""
    start = _after_tags(data, 0)
    frame = _frame(data, start)
    assert frame
    assert data[start + frame.tag_at : start + frame.tag_at + 4] in (b"Xing", b"Info")
    return data[start + frame.size :]


def alike(found: np.ndarray, wanted: np.ndarray, *, delay: int) -> bool:
    """Whether two waveforms are the same sound, up to a codec's loss and a delay of at most so many samples."""
    length = min(len(found), len(wanted))
    spectrum = np.fft.rfft(found[:length], 2 * length) * np.conj(np.fft.rfft(wanted[:length], 2 * length))
    correlation = np.fft.irfft(spectrum)
    shift = int(correlation.argmax())
    strength = correlation[shift] / (np.linalg.norm(found[:length]) * np.linalg.norm(wanted[:length]))
    return bool(min(shift, 2 * length - shift) <= delay and strength > 0.8)


@pytest.mark.parametrize("mode", ["CONSTANT", "VARIABLE", "AVERAGE"])
@pytest.mark.parametrize(("rate", "channels"), [(44_100, 1), (44_100, 2), (16_000, 1), (8_000, 2)])
def test_an_mp3_file_that_does_not_say_its_length_is_read_whole(mode: str, rate: int, channels: int) -> None:
    original = clip(4, 1, rate)
    samples = np.stack([original] * channels, axis=1)
    bare = without_tag(mp3(samples, rate, mode))
    found = load_sound(bare, "x", rate)
    # The codec's delay and its last frame, which nobody says how to cut, stay.
    assert 0 <= len(found) - len(original) < 3 * 1152
    assert alike(found, original, delay=1152 + 529)


def test_an_mp3_file_that_says_its_length_is_left_as_it_is() -> None:
    data = mp3(clip(4, 1))
    assert streams(data, "x") == [data]
    assert len(load_sound(data, "x", RATE)) == len(clip(4, 1))


def test_mp3_files_put_together_are_read_to_the_end() -> None:
    first, second = clip(3, 1), clip(4, 2)
    tags = b"ID3\x03\0\0\0\0\x02\x00" + bytes(256)
    for between in (b"", tags, b"junk" * 30):
        found = load_sound(mp3(first) + between + mp3(second), "x", RATE)
        assert len(found) == pytest.approx(len(first) + len(second), abs=6 * 576)
        assert alike(found[-len(second) - 1152 :], second, delay=3 * 1152)


def test_tags_around_an_mp3_file_are_no_sound() -> None:
    data = mp3(clip(3, 1))
    front, back = (
        b"ID3\x04\0\x10\0\0\x02\x00" + bytes(256) + b"3DI\x04\0\x10\0\0\x02\x00",
        b"TAG" + b"\xff\xfb\x90" * 40 + bytes(5),
    )
    np.testing.assert_array_equal(load_sound(front + data + back, "x", RATE), load_sound(data, "x", RATE))
    bare = without_tag(data)
    np.testing.assert_array_equal(load_sound(front + bare + back, "x", RATE), load_sound(bare, "x", RATE))


def test_the_search_for_frames_sees_every_header_and_is_quick_over_junk() -> None:
    sound = mp3(clip(1, 1))
    start = _after_tags(sound, 0)
    assert streams(b"ID3\x03\0\0\0\0\0\0" + b"\xff" * 5_000_000 + sound, "x") == streams(sound[start:], "x")
    for second, third in itertools.product(range(256), range(256)):
        header = bytes([0xFF, second, third, 0])
        assert not _frame(header, 0) or _LIKE_A_HEADER.match(header)


def test_an_mp3_file_whose_rate_changes_is_refused() -> None:
    with pytest.raises(MediaError, match="changes from 16000 Hz to 44100 Hz at byte") as caught:
        load_sound(mp3(clip(1, 1)) + mp3(clip(1, 1, 44_100), 44_100), "x", RATE)
    assert caught.value.fault == "sample rate"


@pytest.mark.parametrize("tagged", [True, False])
def test_an_mp3_file_cut_within_a_frame_is_refused(tagged: bool) -> None:
    data = mp3(clip(3, 1)) if tagged else without_tag(mp3(clip(3, 1)))
    with pytest.raises(MediaError, match="truncated") as caught:
        load_sound(data[:-20], "x", RATE)
    assert caught.value.fault == "truncated"


@pytest.mark.parametrize(("first", "second"), [("VORBIS", "VORBIS"), ("OPUS", "OPUS"), ("VORBIS", "OPUS")])
def test_chained_ogg_streams_are_one_sound(first: str, second: str) -> None:
    one, two = clip(2, 1), np.stack([clip(3, 2, 48_000)] * 2, axis=1)
    a, b = encoded(one, "OGG", first), encoded(two, "OGG", second, 48_000)
    assert streams(a + b + a, "x") == [a, b, a]
    parts = [load_sound(data, "x", RATE) for data in (a, b, a)]
    np.testing.assert_array_equal(load_sound(a + b + a, "x", RATE), np.concatenate(parts))
    with pytest.raises(MediaError, match="the limit is 4 s"):
        load_sound(a + b, "x", RATE, max_seconds=4)


def test_an_ogg_file_with_a_damaged_page_is_refused() -> None:
    data = bytearray(encoded(clip(9, 1), "OGG", "VORBIS"))
    second = data.find(b"OggS", data.find(b"OggS", 1000) + 1)
    data[second : second + 4] = b"????"
    with pytest.raises(MediaError, match=f"no page where one should be, at byte {second}"):
        load_sound(bytes(data), "x", RATE)


def test_a_flac_file_of_unknown_length_is_read_to_its_end() -> None:
    data = bytearray(encoded(clip(9, 1), "FLAC", "PCM_16"))
    # STREAMINFO, bytes 10 to 17: 20 bits rate, 3 channels, 5 depth, 36 number of samples.
    info = int.from_bytes(data[18:26], "big")
    assert info % 2**36 == len(clip(9, 1))
    data[18:26] = (info >> 36 << 36).to_bytes(8, "big")
    np.testing.assert_allclose(load_sound(bytes(data), "x", RATE), clip(9, 1), atol=1e-4)
    with pytest.raises(MediaError, match="over 3 s, the limit is 3 s"):
        load_sound(bytes(data), "x", RATE, max_seconds=3)


@pytest.mark.parametrize(("kind", "subtype"), [("WAV", "PCM_24"), ("FLAC", "PCM_16"), ("OGG", "VORBIS"), ("MP3", None)])
@pytest.mark.parametrize("rate", [RATE, 44_100])
def test_blocks_do_not_show(kind: str, subtype: str | None, rate: int, monkeypatch: pytest.MonkeyPatch) -> None:
    samples = np.stack([clip(3, 1, rate), clip(3, 2, rate)], axis=1)
    data = encoded(samples, kind, subtype, rate)
    whole, _ = soundfile.read(io.BytesIO(data), dtype="float32")
    mono = whole.mean(axis=1, dtype=np.float32)
    expected = mono if rate == RATE else soxr.resample(mono, rate, RATE, quality="VHQ")
    for size in (2**18, 1000):
        monkeypatch.setattr(sounds, "_BLOCK_SAMPLES", size)
        # The MP3 decoder rounds otherwise where soundfile has set it to the beginning once more.
        np.testing.assert_allclose(load_sound(data, "x", RATE), expected, rtol=0, atol=1e-6 if kind == "MP3" else 0)
        level = normalise_loudness(expected, -23.0)
        assert 20 * np.log10(np.sqrt(np.mean(level.astype(float) ** 2))) == pytest.approx(-23.0, abs=1e-4)


@pytest.mark.parametrize("rate", [1, 999, 1_000_001, 2**31 - 1])
def test_a_sample_rate_that_cannot_be_is_refused(rate: int) -> None:
    data = bytearray(encoded(clip(0.1, 1), "WAV", "PCM_16"))
    data[24:28] = rate.to_bytes(4, "little")
    with pytest.raises(MediaError, match=rf"{rate} Hz by its header, outside 1000 to 1000000") as caught:
        load_sound(bytes(data), "x", RATE)
    assert caught.value.fault == "sample rate"


def test_samples_that_become_infinite_on_the_way_are_refused() -> None:
    high = np.full((1000, 2), 3e38, np.float32)
    for samples, rate in ((high, RATE), (high[:, 0], 8000)):
        with pytest.raises(MediaError, match="NaN or infinite"):
            load_sound(encoded(samples, "WAV", "FLOAT", rate), "x", RATE)


@given(st.integers(1, 5000), st.integers(1, 50), st.integers(1, 40))
@settings(deadline=None)
def test_equal_parts_are_the_whole_in_few_pieces_of_nearly_one_length(samples: int, hop: int, most: int) -> None:
    waveform = np.arange(samples, dtype=np.float32)
    parts = equal_parts(waveform, hop, most)
    np.testing.assert_array_equal(np.concatenate(parts), waveform)
    frames = [-(-len(part) // hop) for part in parts]
    assert max(frames) <= most
    assert len(parts) <= -(-samples // (hop * most))
    assert all(len(part) == len(parts[0]) for part in parts[:-1])

"""Large media of a tar on disk: read by whoever decodes them, and the same documents as those that were in memory."""

from __future__ import annotations

import io
import mmap
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.corpus.documents import Document, Reject
from pipelines.corpus.errors import TransientError
from pipelines.corpus.files import StoredBytes
from pipelines.corpus.filters import Filters
from pipelines.tokenize.decoder import answered
from pipelines.tokenize.prepare import Prepared, prepare
from pipelines.tokenize.worker import UnitWorker
from tests.pipelines.reading import everything
from tests.pipelines.test_readers_media_tar import contents, divided, tar_bytes, tar_source, write_tar
from tests.pipelines.tiny import tiny_recipe


def _wav(seconds: float, seed: int = 0) -> bytes:
    file = io.BytesIO()
    samples = np.random.default_rng(seed).uniform(-0.5, 0.5, int(8000 * seconds))
    soundfile.write(file, samples, 8000, format="WAV", subtype="PCM_16")
    return file.getvalue()


LARGE, SMALL = _wav(5.0), _wav(0.5)


def test_large_media_stay_on_disk_until_they_are_decoded_and_small_ones_do_not(tmp_path: Path) -> None:
    file = write_tar(tmp_path / "x.tar", [("a.wav", LARGE), ("a.txt", b"t" * 99_999), ("b.wav", SMALL)])
    large, small = everything(tar_source(file))
    assert isinstance(large, Document)
    assert isinstance(small, Document)
    text, sound = large.spans
    assert (len(text.text), small.spans[0].data) == (99_999, SMALL)
    assert isinstance(sound.data, StoredBytes)
    assert (len(sound.data), sound.content) == (len(LARGE), LARGE)
    in_memory = replace(large, spans=(text, replace(sound, data=LARGE)))
    assert large.loaded() == in_memory
    assert (large.row_id, large.content_hash) == (in_memory.row_id, in_memory.content_hash)
    assert small.loaded() is small


@settings(max_examples=20)
@given(st.lists(st.integers(0, 200_000), max_size=5), st.lists(st.integers(1, 10**9), max_size=3))
def test_members_of_any_size_come_whole_however_a_tar_is_divided(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], cuts: list[int]
) -> None:
    members = [(f"{n}.wav", bytes([n + 1]) * size) for n, size in enumerate(sizes)]
    file = write_tar(tmp_path_factory.mktemp("tar") / "x.tar", members)
    assert contents(divided(tar_source(file), cuts)) == [(name[:-4], [data]) for name, data in members]


def test_a_tar_that_is_cut_off_within_large_media_is_said_to_be(tmp_path: Path) -> None:
    whole = tar_bytes([("a.wav", LARGE), ("b.wav", LARGE)])
    (tmp_path / "x.tar").write_bytes(whole[: len(LARGE) + 40_000])
    first, reject = everything(tar_source(tmp_path / "x.tar"))
    assert contents([first]) == [("a", [LARGE])]
    assert isinstance(reject, Reject)
    assert reject.reason == "tar: truncated"
    assert "cut off within member b.wav" in reject.error


def _document(folder: Path) -> tuple[Document, UnitWorker]:
    file = write_tar(folder / "x.tar", [("a.wav", LARGE)])
    (document,) = everything(tar_source(file))
    assert isinstance(document, Document)
    return document, UnitWorker(tiny_recipe(folder))


def test_what_is_gone_when_it_is_to_be_decoded_is_rejected(tmp_path: Path) -> None:
    document, worker = _document(tmp_path)
    settings, shapes = worker.recipe.tokenizers, worker.tokenizers.shapes
    assert isinstance(prepare(document, Filters(), settings, shapes), Prepared)
    (tmp_path / "x.tar").write_bytes(tar_bytes([("a.wav", LARGE[:30_000])]))
    shorter = prepare(document, Filters(), settings, shapes)
    (tmp_path / "x.tar").unlink()
    gone = prepare(document, Filters(), settings, shapes)
    assert isinstance(shorter, Reject)
    assert isinstance(gone, Reject)
    assert shorter.reason == gone.reason == "file: unreadable"
    assert (
        "w/x.tar#a: cannot be read: 39,596 of the 80,044 bytes from 512 on are gone; restore or remove it"
        in shorter.error
    )
    assert "No such file or directory; restore or remove it" in gone.error


def test_a_file_system_that_is_away_fails_the_unit_in_a_decoder_too(tmp_path: Path) -> None:
    # A process's own memory answers EIO where nothing is mapped, as a network file system does without its server.
    away = StoredBytes("/proc/self/mem", 0, 10)
    with pytest.raises(TransientError, match="/proc/self/mem: Input/output error: its file system does not answer"):
        away.read()
    document, worker = _document(tmp_path)
    document = replace(document, spans=(replace(document.spans[0], data=away),))
    name = worker.recipe.sources[0].name
    # What a decoder answers is what its worker raises: test_decoders.py.
    error = pickle.loads(answered(worker._reading.preparation, mmap.mmap(-1, 1), name, None, [document]))
    assert isinstance(error, TransientError)
    assert "its file system does not answer" in str(error)

"""`braid tokenizer ...`: the ways of a user, from a released file to a sheet."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch

from pipelines.tokenizers.encodec import AudioTokenizer
from pipelines.tokenizers.sentencepiece import TextTokenizer
from tests.pipelines.released import OriginalVQGAN, encodec_24khz
from tests.pipelines.test_cli import braid


def test_a_fetched_model_is_converted_at_once_and_says_where_it_is_from(tmp_path: Path) -> None:
    source = tmp_path / "encodec_24khz-0.th"
    torch.save(encodec_24khz().state_dict(), source)
    sha256 = hashlib.sha256(source.read_bytes()).hexdigest()
    command = ("tokenizer", "fetch", source.as_uri(), "--sha256", sha256, "--out", str(tmp_path / "mine"))
    done = braid(*command, "--convert", "--licence", "CC-BY-4.0")
    assert done.returncode == 0, done.stderr
    assert f"Fetched {tmp_path}/mine/encodec_24khz-0.th" in done.stdout
    card = json.loads((tmp_path / "mine" / "card.json").read_text())
    assert (card["source"]["url"], card["licence"]) == (source.as_uri(), "CC-BY-4.0")
    assert card["source"]["files"][0]["sha256"] == sha256
    assert AudioTokenizer.load(tmp_path / "mine", n_q=2).n_q == 2
    again = braid(*command)
    assert again.returncode == 0
    wrong = braid(*command[:4], "0" * 64, *command[5:])
    assert wrong.returncode == 1
    assert "is there already, but its sha256 is" in " ".join(wrong.stderr.split())


def test_a_released_vqgan_is_converted_by_its_folder(tmp_path: Path) -> None:
    folder = OriginalVQGAN().release(tmp_path / "vq")
    done = braid("tokenizer", "convert", str(folder), "--out", str(tmp_path / "mine"))
    assert done.returncode == 0, done.stderr
    assert f"its card is {tmp_path}/mine/card.md" in done.stdout
    assert (tmp_path / "mine" / "weights.safetensors").exists()


def test_a_text_tokenizer_is_trained_and_checked(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("".join(f"line number {n} of a small book, {n * n}\n" for n in range(400)))
    out = str(tmp_path / "book")
    done = braid("tokenizer", "train", "text", "--data", str(tmp_path), "--out", out, "--pieces", "310")
    assert done.returncode == 0, done.stderr
    assert TextTokenizer.load(tmp_path / "book" / "book.model").pieces == 310
    command = json.loads((tmp_path / "book" / "card.json").read_text())["command"]
    assert command == f"braid tokenizer train text --data {tmp_path} --out {out} --pieces 310"
    sheet = tmp_path / "sheet.html"
    done = braid("tokenizer", "check", out, "--data", str(tmp_path / "a.txt"), "--out", str(sheet), "--items", "3")
    assert done.returncode == 0, done.stderr
    assert "310 pieces" in sheet.read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("convert", "nowhere", "--out", "x"), "nowhere: no such file or folder"),
        (("fetch", "http://127.0.0.1:9/a.th", "--out", "x"), "--sha256 has 0 of 64 digits"),
        (("check", "nothing", "--data", "."), "no tokenizer 'nothing'"),
        (("train", "text", "--data", "nowhere", "--out", "x"), "nowhere: no such file or folder"),
    ],
)
def test_a_mistake_ends_in_one_message(
    arguments: tuple[str, ...], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = braid("tokenizer", *arguments)
    assert (done.returncode, message in " ".join(done.stderr.split())) == (1, True), done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_the_help_of_training_names_the_three_kinds() -> None:
    shown = braid("tokenizer", "train", "--help").stdout
    assert all(kind in shown for kind in ("image", "audio", "text"))
    for kind in ("image", "audio", "text"):
        done = braid("tokenizer", "train", kind, "--help")
        assert (done.returncode, "--data" in done.stdout, "--out" in done.stdout) == (0, True, True), done.stderr

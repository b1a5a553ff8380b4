"""Training a text tokenizer: what it is made from, what it can do, what its card says."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from pipelines.tokenizers.sentencepiece import TextTokenizer
from pipelines.tokenizers.text_evaluation import evaluate
from pipelines.tokenizers.train_text import (
    LONGEST,
    TextTrainingError,
    TextTrainingOptions,
    read_lines,
    text_files,
    train,
)

WORDS = ["river", "stone", "walking", "über", "naïve", "данные", "x=3;", "12,500", "(see below)", "house", "don't", "→"]


def lines(count: int, seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    return [
        f"{' ' * rng.randint(0, 4)}{' '.join(rng.choices(WORDS, k=9))} {rng.randint(0, 9999)}." for _ in range(count)
    ]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """A text file, one of JSON lines below a folder, and what is no text."""
    folder = tmp_path / "corpus"
    (folder / "more").mkdir(parents=True)
    (folder / "a.txt").write_text("\n".join(lines(400)) + "\n\n")
    records = [json.dumps({"text": "\n".join(lines(3, seed)), "id": seed}) for seed in range(100)]
    (folder / "more" / "b.jsonl").write_text("\n".join([*records, "{broken", '{"id": 3}', '{"text": 3}', "", '"text"']))
    (folder / "c.png").write_bytes(b"\xff")
    (folder / "d.txt").write_bytes(b"good line\n" + b"bad \xff line\n")
    return folder


def trained(folder: Path, out: Path, **options: Any) -> TextTokenizer:
    return TextTokenizer.load(train(TextTrainingOptions(data=(folder,), out=out, **({"pieces": 420} | options))))


def test_a_trained_model_is_lossless_divisible_and_knows_every_byte(corpus: Path, tmp_path: Path) -> None:
    tokenizer = trained(corpus, tmp_path / "mine")
    assert (tokenizer.name, tokenizer.pieces, tokenizer.divisible) == ("mine", 420, True)
    text = "  two  spaces, a\ttab\nand a line; 日本語 🙂 </s> <|end|> " + " ".join(lines(2))
    (ids,) = tokenizer.encode([text])
    assert tokenizer.decode(ids) == text
    assert not any(tokenizer.processor.is_unknown(int(i)) for i in ids)
    assert tokenizer.processor.encode("2024", out_type=str)[-4:] == ["2", "0", "2", "4"]
    long = " ".join(lines(200, seed=5))
    assert tokenizer.encode([long])[0].tolist() == tokenizer.processor.encode(long)


def test_the_card_measures_lines_that_were_not_trained_on(corpus: Path, tmp_path: Path) -> None:
    tokenizer = trained(corpus, tmp_path / "mine", data_licence="CC0", command="braid tokenizer train text ...")
    card = json.loads((tmp_path / "mine" / "card.json").read_text())
    assert (card["sha256"], card["pieces"], card["divisible"]) == (tokenizer.sha256, 420, True)
    assert (card["files"], card["left_out"], card["data_licence"]) == (3, 5, "CC0")
    held_out = card["held_out"]
    # Of 701 lines that are not empty about 5% are held out; the others are trained on.
    assert 10 <= held_out["texts"] <= 80
    assert held_out["texts"] + card["trained_on"]["lines"] == 701
    assert 1.5 < held_out["bytes_per_piece"] < 8
    assert (held_out["unknown"], held_out["round_trip"]) == (0, 1)
    text = (tmp_path / "mine" / "card.md").read_text()
    for said in (
        tokenizer.sha256,
        "CC0",
        "braid tokenizer train text ...",
        f"| bytes a piece | {held_out['bytes_per_piece']} |",
    ):
        assert said in text
    assert {path.name for path in (tmp_path / "mine").iterdir()} == {"mine.model", "card.json", "card.md"}


def test_the_same_seed_gives_the_same_model_and_another_draws_other_lines(corpus: Path, tmp_path: Path) -> None:
    total = sum(path.stat().st_size for path in text_files([corpus]))
    few = total * 0.6 / 1e6
    models = {
        name: trained(corpus, tmp_path / name, seed=seed, max_mb=few, pieces=380).sha256
        for name, seed in (("one", 1), ("again", 1), ("two", 2))
    }
    assert models["one"] == models["again"] != models["two"]
    drawn = json.loads((tmp_path / "one" / "card.json").read_text())["trained_on"]
    assert 0.4 * total < drawn["bytes"] < 0.75 * total


def test_lines_longer_than_the_trainer_takes_are_trained_on_in_parts(tmp_path: Path) -> None:
    unheard = "日本語テキスト"
    text = [*lines(300), unheard * 900, " ".join(["extraordinarily"] * 800)]
    (tmp_path / "a.txt").write_text("\n".join(text))
    tokenizer = trained(tmp_path / "a.txt", tmp_path / "mine", pieces=450)
    assert max(map(len, text)) > 5 * LONGEST
    # Both make pieces only if their lines, of 18,900 and 12,799 bytes, were seen.
    assert len(tokenizer.encode([unheard])[0]) < len(unheard)
    assert len(tokenizer.encode(["extraordinarily"])[0]) < 4


def test_what_is_no_text_is_told_with_its_line(corpus: Path) -> None:
    refused: list[str] = []
    found = list(read_lines(text_files([corpus]), "text", refused))
    assert len([line for line in found if line.strip()]) == 701
    told = [what.removeprefix(f"{corpus}/").split(": ")[:2] for what in refused]
    assert told == [
        ["d.txt:2", "UnicodeDecodeError"],
        ["more/b.jsonl:101", "JSONDecodeError"],
        ["more/b.jsonl:102", "KeyError"],
        ["more/b.jsonl:103", "TypeError"],
        ["more/b.jsonl:105", "TypeError"],
    ]


@pytest.mark.parametrize(
    ("pieces", "message"),
    [
        (60_000, r"60000 pieces, but this text gives \d+ at the most"),
        (260, r"bytes and single characters alone are \d+"),
    ],
)
def test_a_vocabulary_that_the_text_cannot_fill_is_refused_with_its_limit(
    corpus: Path, tmp_path: Path, pieces: int, message: str
) -> None:
    with pytest.raises(TextTrainingError, match=message):
        trained(corpus, tmp_path / "mine", pieces=pieces)
    assert not (tmp_path / "mine").exists()


def test_without_text_there_is_no_training(tmp_path: Path) -> None:
    with pytest.raises(TextTrainingError, match=r"nowhere: no such file or folder"):
        trained(tmp_path / "nowhere", tmp_path / "mine")
    (tmp_path / "empty").mkdir()
    with pytest.raises(TextTrainingError, match=r"empty: no text file \(\.txt, \.jsonl\) in it"):
        trained(tmp_path / "empty", tmp_path / "mine")
    (tmp_path / "empty" / "a.txt").write_text("\n \n")
    with pytest.raises(TextTrainingError):
        trained(tmp_path / "empty", tmp_path / "mine")


def test_the_figures_count_what_they_say() -> None:
    tokenizer = TextTokenizer.load("mistral-v1")
    figures = evaluate(tokenizer, ["the cat", "the 𓀀"])
    ids = [*tokenizer.encode(["the cat"])[0], *tokenizer.encode(["the 𓀀"])[0]]
    assert figures["pieces"] == len(ids)
    assert figures["bytes_per_piece"] == pytest.approx(15 / len(ids), abs=1e-3)
    assert figures["pieces_per_word"] == pytest.approx(len(ids) / 4, abs=1e-3)
    assert figures["byte_pieces"] == pytest.approx(4 / len(ids), abs=1e-3)
    assert (figures["unknown"], figures["round_trip"], figures["pieces_used"]) == (0, 1, len(set(ids)))

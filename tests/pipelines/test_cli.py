"""The command: exit codes and messages that a person can act on, never a traceback for a user's mistake."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from pipelines.cli.prompts import by_modality, in_order
from tests.pipelines.corpora import make_dataset
from tests.pipelines.tiny import write_corpus, write_recipe


def braid(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "pipelines.cli", *arguments], capture_output=True, text=True)


def test_a_faulty_recipe_exits_with_2_and_lists_every_fault(tmp_path: Path) -> None:
    write_corpus(tmp_path)
    file = write_recipe(tmp_path)
    file.write_text(file.read_text().replace("validation_share: 0.2", "validation_shore: 2"))
    done = braid("tokenize", str(file), "units.inputs=0")
    assert done.returncode == 2
    assert "2 faults in the recipe" in done.stderr
    assert "validation_shore: unknown key; did you mean validation_share?" in done.stderr
    assert "command line: units.inputs = 0: Input should be greater than or equal to 1" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("stats", "nowhere"), 1, "nowhere: no token dataset here; make one with `braid tokenize"),
        (("tokenize", "nowhere"), 2, "nor a shipped recipe; shipped are"),
        (("pretrain", "pretrain/demo", "modle.hidden_size=3"), 2, "modle: unknown key; did you mean model?"),
        (("tokenizer", "train", "smell"), 2, "No such command 'smell'"),
        (("generate", "nowhere", "--want", "image"), 1, "nowhere"),
        (("report", "nowhere"), 1, "nowhere"),
    ],
)
def test_a_mistake_is_answered_in_one_message(
    arguments: tuple[str, ...], code: int, message: str, tmp_path: Path
) -> None:
    done = braid(*arguments)
    assert (done.returncode, message in " ".join(done.stderr.split())) == (code, True), done.stderr
    assert "Traceback" not in done.stderr


def test_stats_as_json_is_json_alone(tmp_path: Path) -> None:
    make_dataset(tmp_path / "d")
    done = braid("stats", str(tmp_path / "d"), "--json")
    figures = json.loads(done.stdout)
    assert figures["documents"] == 21
    assert {"text_sha256": "t", "image_sha256": "i", "audio_sha256": "a"}.items() <= figures["tokenizers"].items()
    assert figures["tokens"]["total"] == sum(figures["tokens"][m] for m in ("text", "image", "audio"))


def test_a_row_that_is_not_there_says_which_are(tmp_path: Path) -> None:
    make_dataset(tmp_path / "d")
    done = braid("show", str(tmp_path / "d"), "99")
    assert done.returncode == 1
    assert "no row 99; version 3 has rows 0 to 20" in done.stderr


def test_a_prompt_keeps_its_order_on_the_command_line() -> None:
    given = ["run", "--image", "a.png", "--prompt", "between", "--want=audio", "--image=b.png", "--prompt", "--odd"]
    assert in_order(given) == [("image", "a.png"), ("prompt", "between"), ("image", "b.png"), ("prompt", "--odd")]


def test_a_number_is_for_all_modalities_or_for_one() -> None:
    assert by_modality(["1.1", "audio=1.5"], "--x") == {"text": 1.1, "image": 1.1, "audio": 1.5}
    assert by_modality([], "--x") == {}
    for wrong in ("much", "video=2", "text=much"):
        with pytest.raises(typer.BadParameter):
            by_modality([wrong], "--x")

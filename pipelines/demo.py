"""`make demo`: the whole way on real input, with the commands that a user would type.

    python -m pipelines.demo --out demo

Enters: two Debian packages (or a folder that holds them). Leaves: below `--out` the corpus, a token dataset, rows of it
decoded back, a tiny trained model, what it generated, and one page that shows it all. A second run reuses everything.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
from rich.console import Console

from pipelines.corpus.debian import default_cache
from pipelines.corpus.demo import prepare
from pipelines.shards.dataset import Dataset
from pipelines.shards.split import is_validation

SHOWN_ROWS = 8
PROMPTS = ("Un chat.", "Une pomme rouge.", "Un oiseau bleu.", "Une voiture.")
"""Captions; each goes on with a picture and then a voice, as the documents of the corpus do."""
SHIPPED_MODEL = "spoken_drawings"
SHIPPED_PROMPTS = (
    "en: peru, america, flags, signs and symbols",
    "de: parking, roadsigns, transportation",
    "fr: red apple, fruit, food",
)
TEXT_PROMPTS = ("The package", "Debian", "You can use", "The file system")


def main() -> None:
    parser = argparse.ArgumentParser(description="From raw pictures, voices and text to generated ones.")
    parser.add_argument("--out", type=Path, default=Path("demo"), help="where everything goes (default: demo)")
    parser.add_argument("--language", default="fr", help="of captions and voices, such as fr, es, ca, ru (default: fr)")
    parser.add_argument("--stamps", type=int, default=None, help="how many pictures to use (default: all that fit)")
    parser.add_argument(
        "--packages", type=Path, default=None, help="folder with the Debian packages, if there is no apt-get"
    )
    arguments = parser.parse_args()
    console = Console(highlight=False)
    began = time.monotonic()
    out: Path = arguments.out
    tokens, rows, run, generated, shipped = (out / name for name in ("tokens", "rows", "run", "generated", "shipped"))
    evaluation, shipped_page, page = (out / f"{name}.html" for name in ("evaluation", "shipped", "page"))

    _title(console, "1  Raw data: pictures, captions, voices, and a handbook")
    corpus = prepare(
        out / "corpus",
        default_cache(),
        language=arguments.language,
        packages_folder=arguments.packages,
        **({"stamps": arguments.stamps} if arguments.stamps else {}),
    )
    _title(console, "2  Tokenize: one dataset of three modalities")
    sources = [f"sources.0.path={corpus / 'stamps'}", f"sources.1.path={corpus / 'text'}"]
    _braid(console, "tokenize", "tokenize/demo", f"dataset={tokens}", *sources)
    _title(console, "3  What is in it")
    _braid(console, "stats", str(tokens))
    _title(console, "4  Rows of it, back to text, pictures and sound")
    shown = _rows_with_media(Dataset.open(tokens))
    _braid(console, "show", str(tokens), *shown, "--out", str(rows))
    _title(console, "5  Pretrain a tiny model on it")
    _braid(console, "pretrain", "pretrain/demo", f"output={run}", f"data.dataset={tokens}")
    _title(console, "6  Let it draw, speak and write")
    for prompt in PROMPTS:
        _generate(console, run, prompt, generated, "--want", "image", "--want", "audio")
    for prompt in TEXT_PROMPTS:
        _generate(console, run, prompt, generated, "--want", "text", "--max-tokens", "40")
    _title(console, "7  How good it is on documents that it has not seen")
    measured = ["--limit", "24", "--samples", "4", "--html", str(evaluation)]
    _braid(console, "evaluate", str(run), str(tokens), *measured)
    _title(console, "8  And the model that comes with Braid, which has learned from more of the same")
    for prompt in SHIPPED_PROMPTS:
        _generate(console, SHIPPED_MODEL, prompt, shipped, "--want", "image", "--want", "audio", "--guidance", "3")
    _braid(console, "report", "--generated", str(shipped), "--title", "spoken_drawings", "--out", str(shipped_page))
    _title(console, "9  One page of it all")
    inputs = ["--dataset", str(tokens), "--generated", str(generated), *(f"--row={row}" for row in shown)]
    _braid(console, "report", str(run), *inputs, "--title", "The demo", "--out", str(page))

    minutes, seconds = divmod(round(time.monotonic() - began), 60)
    _title(console, f"Done in {minutes} min {seconds} s")
    for path, what in {
        page: "open this: what went in, losses, what came out",
        evaluation: "and this: figures beside their baselines",
        shipped_page: "what the shipped model drew and said",
        corpus: "the raw corpus",
        tokens: "the token dataset",
        rows: "rows of it, decoded back",
        run: "the trained model, its metrics and checkpoints",
        generated: "pictures, voices and texts that it made",
    }.items():
        console.print(f"  {path!s:20} {what}", soft_wrap=True)


def _rows_with_media(dataset: Dataset) -> list[str]:
    """Ids of some documents with all three modalities, spread over the dataset, half of them held out from training."""
    ids: dict[bool, list[str]] = {True: [], False: []}
    for batch in dataset.read(["row_id", "source", "num_image", "num_audio"]):
        both = pc.and_(pc.greater(batch["num_image"], 0), pc.greater(batch["num_audio"], 0))
        for row in pa.table(batch).filter(both).select(["row_id", "source"]).to_pylist():
            ids[is_validation(row["source"], dataset.validation_share)].append(row["row_id"])
    chosen: list[str] = []
    for group in ids.values():
        group.sort()
        chosen += [row[:12] for row in group[:: max(1, len(group) // (SHOWN_ROWS // 2))][: SHOWN_ROWS // 2]]
    return chosen


def _generate(console: Console, model: Path | str, prompt: str, out: Path, *options: str) -> None:
    sampling = ("--temperature", "0.9", "--top-p", "0.95")
    _braid(console, "generate", str(model), "--prompt", prompt, *options, *sampling, "--out", str(out))


def _title(console: Console, text: str) -> None:
    console.print()
    console.rule(f"[bold]{text}", align="left")


def _braid(console: Console, *arguments: str) -> None:
    """Run a command of Braid as a user would, and say which; its failure ends the demo."""
    console.print(f"$ braid {shlex.join(arguments)}", style="dim", soft_wrap=True)
    done = subprocess.run([sys.executable, "-m", "pipelines.cli", *arguments], check=False)
    if done.returncode:
        sys.exit(done.returncode)


if __name__ == "__main__":
    main()

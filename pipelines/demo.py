"""`make demo`: the whole way on real input, with the commands that a user would type.

    python -m pipelines.demo --out demo

Enters: two Debian packages (or a folder that holds them). Leaves: below `--out` the corpus, a token dataset, and rows of
it decoded back to files. A second run reuses everything.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.compute as pc
from rich.console import Console

from pipelines.corpus.demo import default_cache, prepare
from pipelines.shards.dataset import Dataset

SHOWN_ROWS = 8


def main() -> None:
    parser = argparse.ArgumentParser(description="From raw pictures, voices and text to a token dataset.")
    parser.add_argument("--out", type=Path, default=Path("demo"), help="where everything goes (default: demo)")
    parser.add_argument("--language", default="fr", help="of captions and voices, such as fr, es, ca, ru (default: fr)")
    parser.add_argument("--stamps", type=int, default=None, help="how many pictures to use")
    parser.add_argument(
        "--packages", type=Path, default=None, help="folder with the Debian packages, if there is no apt-get"
    )
    arguments = parser.parse_args()
    console = Console(highlight=False)
    began = time.monotonic()
    out: Path = arguments.out
    dataset = out / "tokens"

    console.rule("1. Raw data: pictures, captions, voices and a handbook", align="left")
    corpus = prepare(
        out / "corpus",
        default_cache(),
        language=arguments.language,
        packages_folder=arguments.packages,
        **({"stamps": arguments.stamps} if arguments.stamps else {}),
    )
    console.rule("2. Tokenize: one dataset of three modalities", align="left")
    _braid(
        console,
        "tokenize",
        "tokenize/demo",
        f"dataset={dataset}",
        f"sources.0.path={corpus / 'stamps'}",
        f"sources.1.path={corpus / 'text'}",
    )
    console.rule("3. What is in it", align="left")
    _braid(console, "stats", str(dataset))
    console.rule("4. Rows of it, back to text, pictures and sound", align="left")
    rows = out / "rows"
    _braid(console, "show", str(dataset), *_rows_with_media(Dataset.open(dataset)), "--out", str(rows))

    minutes, seconds = divmod(round(time.monotonic() - began), 60)
    console.rule(f"Done in {minutes} min {seconds} s", align="left")
    console.print(
        f"  {corpus}   the raw corpus\n  {dataset}   the token dataset\n  {rows}     rows decoded back", soft_wrap=True
    )


def _rows_with_media(dataset: Dataset) -> list[str]:
    """Ids of some documents with all three modalities, spread over the dataset."""
    ids: list[str] = []
    for batch in dataset.read(["row_id", "num_image", "num_audio"]):
        both = pc.and_(pc.greater(batch["num_image"], 0), pc.greater(batch["num_audio"], 0))
        ids += batch["row_id"].filter(both).to_pylist()
    ids.sort()
    return [row[:12] for row in ids[:: max(1, len(ids) // SHOWN_ROWS)][:SHOWN_ROWS]]


def _braid(console: Console, *arguments: str) -> None:
    """Run a command of Braid as a user would, and say which; its failure ends the demo."""
    console.print(f"$ braid {shlex.join(arguments)}", style="bold", soft_wrap=True)
    done = subprocess.run([sys.executable, "-m", "pipelines.cli", *arguments], check=False)
    if done.returncode:
        sys.exit(done.returncode)


if __name__ == "__main__":
    main()

"""Text: the whole job against the bare tokenizer loop and against datatrove: `python -m benchmarks.text_job`.

Corpora: handbooks and manual pages in Latin, Cyrillic and Japanese script. Every document's ids are compared, between
the job and the sentencepiece library's own loop, and with datatrove's (in number, over the whole corpus).
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np

from benchmarks.corpora import texts
from benchmarks.jobs import bare, ids_by_source, whole_job
from benchmarks.measuring import close, result
from benchmarks.peers import python_with
from benchmarks.units import one_unit
from pipelines.sequence import Modality
from pipelines.tokenize.recipe import TokenizeRecipe
from pipelines.tokenize.worker import UnitWorker
from pipelines.tokenizers.sentencepiece import TextTokenizer, packaged

WORKERS = 2


def library() -> Callable[[str], list[int]]:
    encode: Callable[[str], list[int]] = TextTokenizer.load("mistral-v1").processor.encode
    return encode


def engine() -> Callable[[str], np.ndarray]:
    tokenizer = TextTokenizer.load("mistral-v1")
    return lambda text: tokenizer.encode([text])[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("demo/benchmarks"))
    parser.add_argument("--quick", action="store_true", help="the Cyrillic corpus alone")
    parser.add_argument("--copies", type=int, default=4, help="of the corpus, so that a job is long against its start")
    arguments = parser.parse_args()
    folders = texts(arguments.folder / "texts")
    scripts = ["cyrillic"] if arguments.quick else sorted(folders)
    corpus = arguments.folder / "text_corpus"
    shutil.rmtree(corpus, ignore_errors=True)
    corpus.mkdir(parents=True)
    files = [file for script in scripts for file in sorted(folders[script].iterdir())]
    for copy in range(1 if arguments.quick else arguments.copies):
        for file in files:
            os.link(file, corpus / f"{copy}-{file.parent.name}-{file.name}")

    recipe = TokenizeRecipe.model_validate(
        {
            "dataset": str(arguments.folder / "text_tokens"),
            "sources": [{"name": "t", "reader": "jsonl", "path": str(corpus), "id_field": "id"}],
            "tokenizers": {"text": {"model": "mistral-v1"}},
            "units": {"bytes": 8_000_000},
            "workers": WORKERS,
        }
    )
    paths = sorted(corpus.iterdir())
    names, documents = [], []
    for path in paths:
        for line in path.read_text(encoding="utf-8").splitlines():
            record = json.loads(line)
            names.append(f"t/{path.name}#{record['id']}")
            documents.append(record["text"])
    shares = [documents[index::WORKERS] for index in range(WORKERS)]
    megacharacters = sum(map(len, documents)) / 1e6
    print(f"{len(documents):,} documents, {megacharacters:.1f} M characters", flush=True)

    job_s, summary = whole_job(recipe)
    library_s, ids = bare(library, shares)
    engine_s, _ = bare(engine, shares)
    job = ids_by_source(recipe.dataset, Modality.TEXT)
    for share, codes in enumerate(ids):
        for name, expected in zip(names[share::WORKERS], codes, strict=True):
            if job[name].tolist() != expected:
                raise SystemExit(f"{name}: the job's ids are not the library's")
    checked = f"ids of all {len(documents):,} documents equal"
    results = [
        result(
            f"whole job with Ray's start ({summary.ready_s:.1f} s) / {what}, 2 cores",
            *rates,
            "M characters/s",
            checked=checked,
        )
        for what, rates in {
            "bare sentencepiece loops": (megacharacters / job_s, megacharacters / library_s),
            "bare loops of our own engine": (megacharacters / job_s, megacharacters / engine_s),
        }.items()
    ]
    results += one_core(recipe, corpus, arguments.folder / "text_peer")
    for line in results:
        print(line)
    close(results)


def one_core(recipe: TokenizeRecipe, corpus: Path, scratch: Path) -> list[dict[str, object]]:
    """A unit on one core against datatrove's reader and tokenizer with one task, over the same files."""
    first = corpus.parent / "text_first"
    shutil.rmtree(first, ignore_errors=True)
    first.mkdir()
    for file in sorted(corpus.glob("0-*")):
        os.link(file, first / file.name)
    source = recipe.sources[0].model_copy(update={"path": str(first)})
    worker = UnitWorker(recipe.model_copy(update={"sources": [source], "dataset": str(scratch / "ours")}))
    shutil.rmtree(scratch, ignore_errors=True)
    one_unit(worker)
    unit_s, _ = one_unit(worker)
    python = python_with("datatrove", "datatrove==0.10.1", "tokenizers", "sentencepiece", "orjson")
    done = subprocess.run(
        [python, "benchmarks/peer/datatrove_tokens.py", packaged("mistral-v1"), first, scratch / "theirs", "1"],
        env=os.environ | {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    seconds = re.search(r"SECONDS ([\d.]+)", done.stdout)
    assert seconds, done.stderr
    documents = [json.loads(line)["text"] for file in sorted(first.iterdir()) for line in file.open(encoding="utf-8")]
    expected = [ids.tolist() for ids in worker.tokenizers.text.encode(documents)]
    theirs = np.concatenate([np.fromfile(file, np.uint16) for file in sorted((scratch / "theirs/tokens").glob("*.ds"))])
    if theirs.tolist() != [piece for ids in expected for piece in ids]:
        raise SystemExit("datatrove's ids are not ours")
    megatokens = len(theirs) / 1e6
    return [
        result(
            "read, tokenize, write on one core: our unit / datatrove",
            megatokens / unit_s,
            megatokens / float(seconds[1]),
            "M tokens/s",
            checked=f"all {len(theirs):,} ids equal, in order",
        )
    ]


if __name__ == "__main__":
    main()

"""Our text tokenizer against the sentencepiece library's own loop, on one core: `python -m benchmarks.text_tokenizer`.

Corpora: handbooks and manual pages in Latin, Cyrillic and Japanese script, and the Latin one as lines and as one long
text. The ids of every text are compared.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import sentencepiece

from benchmarks.corpora import texts
from benchmarks.measuring import close, medians, result
from pipelines.tokenizers.sentencepiece import TextTokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("demo/benchmarks"))
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    corpora: dict[str, list[str]] = {}
    for script, folder in texts(arguments.folder / "texts").items():
        lines = [line for file in sorted(folder.iterdir()) for line in file.read_text(encoding="utf-8").splitlines()]
        corpora[script] = [json.loads(line)["text"] for line in lines][: 200 if arguments.quick else None]
    corpora["latin, lines"] = [line for text in corpora["latin"] for line in text.splitlines() if line.strip()]
    corpora["latin, one text"] = ["\n".join(corpora["latin"])[:10_000_000]]
    tokenizer = TextTokenizer.load("mistral-v1")
    library: sentencepiece.SentencePieceProcessor = tokenizer.processor
    results = []
    for name, documents in corpora.items():
        for text, ids in zip(documents, tokenizer.encode(documents), strict=True):
            if ids.tolist() != library.encode(text):
                raise SystemExit(f"{name}: the ids of {text[:80]!r} differ")

        def ours(documents: list[str] = documents) -> object:
            return tokenizer.encode(documents)

        def theirs(documents: list[str] = documents) -> object:
            return [library.encode(text) for text in documents]

        fast, bare = medians(ours, theirs, repeat=3 if arguments.quick else 5)
        megacharacters = sum(map(len, documents)) / 1e6
        rates = megacharacters / fast, megacharacters / bare
        checked = f"ids of all {len(documents):,} texts equal"
        what = f"{tokenizer.engine} / sentencepiece, {name}"
        results.append(result(what, *rates, "M characters/s", checked=checked))
        print(results[-1], flush=True)
    close(results)


if __name__ == "__main__":
    main()

"""Our text tokenizer against the sentencepiece library's own loop, on one core: `python -m benchmarks.text_tokenizer`.

Input: the English text of the demo corpus (`--text`, JSON lines), as sections, as lines, and as one long text.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import sentencepiece

from benchmarks.measuring import close, medians, result
from pipelines.tokenizers.sentencepiece import TextTokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--text", type=Path, default=Path("demo/corpus/text/debian-reference.jsonl"))
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    sections = [json.loads(line)["text"] for line in arguments.text.read_text(encoding="utf-8").splitlines()]
    lines = [line for section in sections for line in section.splitlines() if line.strip()]
    tokenizer = TextTokenizer.load("mistral-v1")
    library: sentencepiece.SentencePieceProcessor = tokenizer.processor
    results = []
    for name, texts in {"sections": sections, "lines": lines, "one text": ["\n".join(sections)]}.items():
        equal = all(
            np.array_equal(ours, theirs)
            for ours, theirs in zip(tokenizer.encode(texts), library.encode(texts, num_threads=1), strict=True)
        )
        if not equal:
            raise SystemExit(f"{name}: the ids differ")

        def ours(texts: list[str] = texts) -> object:
            return tokenizer.encode(texts)

        def theirs(texts: list[str] = texts) -> object:
            return [library.encode(text) for text in texts]

        fast, bare = medians(ours, theirs, repeat=3 if arguments.quick else 15)
        megacharacters = sum(map(len, texts)) / 1e6
        rates = megacharacters / fast, megacharacters / bare
        results.append(result(f"text tokenizer, {name}", *rates, "M characters/s", checked="ids equal on every text"))
        print(results[-1])
    close(results)


if __name__ == "__main__":
    main()

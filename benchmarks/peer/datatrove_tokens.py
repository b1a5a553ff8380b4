"""Run by `benchmarks.text_job` in datatrove's own environment: JSON lines to token files, at equal ids.

    python datatrove_tokens.py MODEL CORPUS OUT TASKS

MODEL is a SentencePiece file of BPE kind; it becomes a `tokenizer.json`, because that is what datatrove reads. Prints the
seconds of the pipeline, without the imports and the conversion.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import sentencepiece
from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.readers import JsonlReader
from datatrove.pipeline.tokens import DocumentTokenizer
from tokenizers import Tokenizer, decoders, normalizers
from tokenizers.models import BPE


def convert(model: str, target: Path) -> None:
    """A byte-fallback BPE model without normalization, as the tokenizers library has it."""
    processor = sentencepiece.SentencePieceProcessor(model_file=model)
    pieces = [processor.id_to_piece(i) for i in range(processor.vocab_size())]
    ids = {piece: i for i, piece in enumerate(pieces)}
    merges: list[tuple[str, str]] = []
    # The library merges by score; sorting is stable, so equal scores stay in the order of their ids.
    for piece in sorted(pieces, key=lambda piece: -processor.get_score(ids[piece])):
        splits = [(piece[:i], piece[i:]) for i in range(1, len(piece)) if piece[:i] in ids and piece[i:] in ids]
        merges += sorted(splits, key=lambda split: (ids[split[0]], ids[split[1]]))
    tokenizer = Tokenizer(BPE(ids, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    tokenizer.decoder = decoders.ByteFallback()
    tokenizer.save(str(target))


def main() -> None:
    model, corpus, out, tasks = sys.argv[1], sys.argv[2], Path(sys.argv[3]), int(sys.argv[4])
    out.mkdir(parents=True, exist_ok=True)
    convert(model, out / "tokenizer.json")
    executor = LocalPipelineExecutor(
        pipeline=[
            JsonlReader(corpus, text_key="text", id_key="id"),
            DocumentTokenizer(str(out / "tokens"), str(out / "tokenizer.json"), shuffle_documents=False),
        ],
        tasks=tasks,
        workers=tasks,
        logging_dir=str(out / "logs"),
        skip_completed=False,
    )
    began = time.perf_counter()
    executor.run()
    print(f"SECONDS {time.perf_counter() - began}")


if __name__ == "__main__":
    main()

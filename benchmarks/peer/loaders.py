"""Run by `benchmarks.loader` in an environment of its own: a token dataset through another loader.

    python loaders.py SYSTEM SHARDS WORK MODE

SYSTEM is litdata, streaming or datasets. MODE `whole`: documents, compressed with zstd, shuffled, packed into 8 x 4096 with
boundaries and targets by the same code for all of them (cut where a row is full, which is less work than Braid's packing).
MODE `raw`: sequences of 4,096 tokens, made before, uncompressed, shuffled, token ids alone. Prints seconds of the process's
own time, wall seconds, tokens, and a sum over all ids, as JSON. One process, one thread.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
import types
from collections.abc import Iterable, Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

T, B = 4096, 8


def documents(shards: Path) -> Iterator[dict[str, np.ndarray]]:
    for file in sorted(shards.glob("*.parquet")):
        parquet = pq.ParquetFile(file)
        for group in range(parquet.num_row_groups):
            table = parquet.read_row_group(group, columns=["token_ids", "modality_ids"])
            for ids, modalities in zip(table["token_ids"], table["modality_ids"], strict=True):
                yield {
                    "token_ids": ids.values.to_numpy().astype(np.int32),
                    "modality_ids": modalities.values.to_numpy().astype(np.int8),
                }


def sequences(shards: Path) -> Iterator[dict[str, np.ndarray]]:
    """Concatenated and cut, the last part left out."""
    left = np.empty(0, np.int32)
    for document in documents(shards):
        left = np.concatenate([left, document["token_ids"]])
        while len(left) >= T:
            yield {"token_ids": left[:T].copy()}
            left = left[T:]


def items(shards: Path, mode: str) -> Iterator[dict[str, np.ndarray]]:
    return documents(shards) if mode == "whole" else sequences(shards)


def litdata(shards: Path, work: Path, mode: str) -> Iterable[Any]:
    from litdata import StreamingDataset
    from litdata.streaming.writer import BinaryWriter

    # What `litdata.optimize` uses inside, without its worker processes.
    writer = BinaryWriter(str(work), chunk_bytes="64MB", compression="zstd" if mode == "whole" else None)
    for number, record in enumerate(items(shards, mode)):
        writer[number] = record
    writer.done()
    writer.merge(1)
    return StreamingDataset(str(work), shuffle=True, seed=1)


def _stand_in(name: str) -> type:
    if name.startswith("__"):
        raise AttributeError(name)
    return type(name, (), {})


def streaming(shards: Path, work: Path, mode: str) -> Iterable[Any]:
    # The package imports torchvision for datasets of pictures, which has no CPU build.
    for name in ("torchvision", "torchvision.datasets", "torchvision.transforms", "torchvision.transforms.functional"):
        module = types.ModuleType(name)
        module.__spec__ = ModuleSpec(name, None)
        module.__getattr__ = _stand_in  # type: ignore[method-assign]
        sys.modules[name] = module
    from streaming import MDSWriter, StreamingDataset

    columns = {"token_ids": "ndarray:int32"} | ({"modality_ids": "ndarray:int8"} if mode == "whole" else {})
    with MDSWriter(out=str(work), columns=columns, compression="zstd" if mode == "whole" else None) as writer:
        for record in items(shards, mode):
            writer.write(record)
    return StreamingDataset(local=str(work), shuffle=True, shuffle_seed=1, batch_size=B, num_canonical_nodes=1)


def datasets(shards: Path, work: Path, mode: str) -> Iterable[Any]:
    import datasets as hf

    if mode == "whole":
        # Read as it streams: zstd Parquet, shuffled by shards and through a buffer.
        files = [str(file) for file in sorted(shards.glob("*.parquet"))]
        stream = hf.load_dataset(
            "parquet", data_files=files, split="train", streaming=True, columns=["token_ids", "modality_ids"]
        )
        return stream.shuffle(seed=1, buffer_size=10_000).with_format("numpy")
    work.mkdir(parents=True)
    schema = pa.schema([("token_ids", pa.list_(pa.int32(), T))])
    with pa.ipc.new_stream(str(work / "data.arrow"), schema) as sink:
        for record in sequences(shards):
            sink.write(pa.record_batch([pa.FixedSizeListArray.from_arrays(pa.array(record["token_ids"]), T)], schema))
    return hf.Dataset.from_file(str(work / "data.arrow")).with_format("numpy").shuffle(seed=1)


def packed(stream: Iterable[dict[str, np.ndarray]]) -> Iterator[Any]:
    """Batches as Braid's loader gives them, each document cut where a row is full."""
    from pipelines.loading.batch import pack
    from pipelines.loading.windows import NO_TARGET, Rows

    rows = Rows.allocate(B, T)
    row = at = 0
    for record in stream:
        ids, modalities = record["token_ids"], record["modality_ids"]
        done, size = 0, len(ids)
        while done < size:
            take = min(size - done, T - at)
            here, there = slice(at, at + take), slice(done, done + take)
            rows.token_ids[row, here], rows.modality_ids[row, here] = ids[there], modalities[there]
            rows.positions[row, here] = np.arange(take, dtype=np.int32)
            last = done + take == size
            following = slice(done + 1, done + take + (0 if last else 1))
            inner = slice(at, at + take - (1 if last else 0))
            rows.next_ids[row, inner], rows.next_modality_ids[row, inner] = ids[following], modalities[following]
            if last:
                rows.next_ids[row, at + take - 1], rows.next_modality_ids[row, at + take - 1] = 0, NO_TARGET
            done, at = done + take, at + take
            if at == T:
                row, at = row + 1, 0
            if row == B:
                yield pack(rows, 256, 8)
                rows, row = Rows.allocate(B, T), 0


def main() -> None:
    system, shards, work, mode = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4]
    torch.set_num_threads(1)
    pa.set_cpu_count(1)
    pa.set_io_thread_count(1)
    shutil.rmtree(work, ignore_errors=True)
    dataset = {"litdata": litdata, "streaming": streaming, "datasets": datasets}[system](shards, work, mode)
    tokens, seconds, wall = 0, 0.0, 0.0
    for _ in range(2):
        # The first epoch warms caches of files and memory, as for Braid.
        tokens = 0
        began, wall = time.process_time(), time.perf_counter()
        if mode == "whole":
            for batch in packed(_counted(dataset)):
                tokens += batch.token_ids.numel()
        else:
            loader = torch.utils.data.DataLoader(dataset, batch_size=B, collate_fn=_stack)  # type: ignore[arg-type]
            for batch in loader:
                tokens += batch.numel()
        seconds, wall = time.process_time() - began, time.perf_counter() - wall
    print(
        json.dumps(
            {"cpu_s": seconds, "wall_s": wall, "tokens": tokens, "documents_tokens": _COUNT[0], "sum": _COUNT[1]}
        )
    )


_COUNT = [0, 0]


def _counted(dataset: Iterable[Any]) -> Iterator[Any]:
    """Documents through a torch DataLoader, as users would take them."""
    _COUNT[:] = [0, 0]
    loader = torch.utils.data.DataLoader(dataset, batch_size=None)  # type: ignore[arg-type]
    for record in loader:
        found = {name: np.asarray(record[name]) for name in ("token_ids", "modality_ids")}
        _COUNT[0] += len(found["token_ids"])
        _COUNT[1] += int(found["token_ids"].sum(dtype=np.int64))
        yield found


def _stack(records: list[Any]) -> torch.Tensor:
    return torch.from_numpy(np.stack([np.asarray(record["token_ids"]) for record in records]))


if __name__ == "__main__":
    main()

"""Every reader that a recipe may name, over its sample, as a tiny job without Ray: all documents become rows."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from pyarrow.fs import copy_files
from pydantic import TypeAdapter

from pipelines.corpus.documents import Document, Slice
from pipelines.corpus.reader import Reader
from pipelines.corpus.remote import file_system
from pipelines.corpus.sources import Source
from pipelines.sequence import Modality
from pipelines.shards.dataset import Dataset
from pipelines.shards.schema import Row
from pipelines.tokenize.recipe import TokenizeRecipe
from pipelines.tokenize.tokenizers import Tokenizers
from pipelines.tokenize.units import grouped
from pipelines.tokenize.worker import UnitWorker
from tests.faults import faulty_s3
from tests.pipelines import media_samples, tiny
from tests.pipelines.media_samples import COUNT, caption, picture

READERS: TypeAdapter[Reader] = TypeAdapter(Source)

TEXT, IMAGE, AUDIO = Modality.TEXT, Modality.IMAGE, Modality.AUDIO


@dataclass(frozen=True)
class Sample:
    """A corpus of one format."""

    write: Callable[[Path], dict[str, Any]]
    """Writes it into a folder; the settings of a source that reads it."""
    modalities: tuple[Modality, ...]
    """What every document of it has."""


def lines(folder: Path, record: Callable[[int], dict[str, Any]]) -> str:
    (folder / "lines.jsonl").write_text("\n".join(json.dumps(record(i)) for i in range(COUNT)))
    for i in range(COUNT):
        (folder / f"{i}.png").write_bytes(picture(i))
    return str(folder)


def json_lines(folder: Path) -> dict[str, Any]:
    return {"reader": "jsonl", "path": lines(folder, lambda i: {"text": caption(i)})}


def obelics(folder: Path) -> dict[str, Any]:
    path = lines(folder, lambda i: {"texts": [caption(i), None], "images": [None, f"http://x/{i}.png"]})
    return {"reader": "obelics", "path": path, "media": path}


def mmc4(folder: Path) -> dict[str, Any]:
    def page(i: int) -> dict[str, Any]:
        info = {"image_name": f"{i}.png", "raw_url": "http://x", "matched_text_index": 1, "matched_sim": 0.3}
        return {"text_list": [caption(i), "It ran."], "image_info": [info]}

    return {"reader": "mmc4", "path": (path := lines(folder, page)), "media": path}


def tokenized(folder: Path) -> dict[str, Any]:
    path = lines(folder, lambda i: {"token_ids": list(range(i + 1, i + 20))})
    return {"reader": "tokenized", "path": path, "content": "text"}


SAMPLES = {
    "media_folder": Sample(media_samples.media_folder, (TEXT, IMAGE, AUDIO)),
    "webdataset": Sample(media_samples.web_dataset, (TEXT, IMAGE)),
    "parquet": Sample(media_samples.parquet, (TEXT, IMAGE, AUDIO)),
    "librispeech": Sample(media_samples.librispeech, (TEXT, AUDIO)),
    "common_voice": Sample(media_samples.common_voice, (TEXT, AUDIO)),
    "coco": Sample(media_samples.coco, (TEXT, IMAGE)),
    "jsonl": Sample(json_lines, (TEXT,)),
    "obelics": Sample(obelics, (TEXT, IMAGE)),
    "mmc4": Sample(mmc4, (TEXT, IMAGE)),
    "tokenized": Sample(tokenized, (TEXT,)),
}


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("tokenizers")
    return {
        "text": {"model": str(tiny.text_tokenizer(folder / "text.model"))},
        "image": {"checkpoint": str(tiny.image_tokenizer(folder / "image")), "rows": 4, "columns": 4},
        "audio": {"checkpoint": str(tiny.audio_tokenizer(folder / "audio")), "n_q": 2, "max_frames": 40},
    }


def recipe_over(reader: str, folder: Path, tokenizers: dict[str, Any]) -> TokenizeRecipe:
    """A recipe over the reader's sample, which is written into the folder."""
    (folder / "raw").mkdir()
    source = {"name": "s"} | SAMPLES[reader].write(folder / "raw")
    if reader == "tokenized":
        source["made_with"] = {
            "text_sha256": hashlib.sha256(Path(tokenizers["text"]["model"]).read_bytes()).hexdigest()
        }
    # Small units, so that what can be divided is.
    sizes = {"sequence_length": 256, "units": {"bytes": 3000, "inputs": 2}}
    settings = {"dataset": str(folder / "tokens"), "sources": [source], "tokenizers": tokenizers}
    return TokenizeRecipe.model_validate(settings | sizes)


def test_every_reader_has_a_sample() -> None:
    union, _ = get_args(Source)
    assert {get_args(kind.model_fields["reader"].annotation)[0] for kind in get_args(union)} == set(SAMPLES)


def test_the_recipes_of_the_documentation_are_valid() -> None:
    page = (Path(__file__).parents[2] / "docs/readers.md").read_text()
    sources = [
        source for block in re.findall(r"```yaml\n(.*?)```", page, re.DOTALL) for source in yaml.safe_load(block)
    ]
    assert {READERS.validate_python(source).name for source in sources} >= {"animals", "laion", "coco"}


@pytest.mark.parametrize("reader", SAMPLES)
def test_every_document_of_a_sample_becomes_one_row(reader: str, tokenizers: dict[str, Any], tmp_path: Path) -> None:
    recipe = recipe_over(reader, tmp_path, tokenizers)
    worker = UnitWorker(recipe)
    (source,) = recipe.sources
    units = grouped("s", source.inputs(), recipe.units)
    results = [item for unit in units for item in worker.rows(unit)]
    rows = [item for item in results if isinstance(item, Row)]
    assert [item for item in results if not isinstance(item, Row)] == []
    assert len({row.row_id for row in rows}) == len(rows) == COUNT
    for row in rows:
        # Special tokens are text too.
        least = {TEXT: 8, IMAGE: 1, AUDIO: 1}
        assert {m for m in Modality if row.sequence.count(m) >= least[m]} == set(SAMPLES[reader].modalities)
    # The same through shards and a commit.
    dataset = Dataset.create(recipe.dataset, worker.vocabulary, validation_share=0.1)
    dataset.commit([worker.run(unit) for unit in units])
    assert Dataset.open(recipe.dataset).statistics().documents == COUNT
    assert not dataset.quarantined()


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    with faulty_s3() as store, pytest.MonkeyPatch.context() as patch:
        for name, value in store.environment.items():
            patch.setenv(name, value)
        yield "s3://bucket"


@pytest.mark.parametrize("reader", SAMPLES)
def test_a_sample_in_an_object_store_reads_alike(
    reader: str, tokenizers: dict[str, Any], bucket: str, tmp_path: Path
) -> None:
    recipe = recipe_over(reader, tmp_path, tokenizers)
    vocabulary = Tokenizers.load(recipe).vocabulary(recipe)
    filesystem, path = file_system(f"{bucket}/{reader}")
    copy_files(str(tmp_path), path, destination_filesystem=filesystem)

    def documents(settings: dict[str, Any]) -> list[tuple[str, str]]:
        source = READERS.validate_python(settings).bound(vocabulary, recipe.sequence_length)
        found = source.read([Slice(input=item, start=0, stop=item.size) for item in source.inputs()])
        return [(item.row_id, item.content_hash) for item in found if isinstance(item, Document)]

    here = recipe.sources[0].model_dump()
    there = {
        key: str(here[key]).replace(str(tmp_path), f"{bucket}/{reader}") for key in ("path", "media") if here.get(key)
    }
    assert len(documents(here)) == COUNT
    assert documents(here | there) == documents(here)

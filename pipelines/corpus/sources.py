"""The readers that a recipe may name under `sources`, told apart by their key `reader`."""

from typing import Annotated

from pydantic import Field

from pipelines.corpus.coco import CocoSource
from pipelines.corpus.common_voice import CommonVoiceSource
from pipelines.corpus.json_lines import JsonLinesSource
from pipelines.corpus.librispeech import LibriSpeechSource
from pipelines.corpus.media_folder import MediaFolderSource
from pipelines.corpus.mmc4 import Mmc4Source
from pipelines.corpus.obelics import ObelicsSource
from pipelines.corpus.parquet import ParquetSource
from pipelines.corpus.tokenized import TokenizedSource
from pipelines.corpus.webdataset import WebDatasetSource

Source = Annotated[
    MediaFolderSource
    | WebDatasetSource
    | ParquetSource
    | LibriSpeechSource
    | CommonVoiceSource
    | CocoSource
    | JsonLinesSource
    | ObelicsSource
    | Mmc4Source
    | TokenizedSource,
    Field(discriminator="reader"),
]

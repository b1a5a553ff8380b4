"""The readers that a recipe may name under `sources`, told apart by their key `reader`."""

from typing import Annotated

from pydantic import Field

from pipelines.corpus.json_lines import JsonLinesSource
from pipelines.corpus.media_folder import MediaFolderSource

Source = Annotated[MediaFolderSource | JsonLinesSource, Field(discriminator="reader")]

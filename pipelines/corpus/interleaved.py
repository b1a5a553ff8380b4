"""What the readers of web pages with pictures between their texts share: where the pictures lie that a record names."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from pipelines.corpus.documents import RawSpan
from pipelines.corpus.errors import RecordError
from pipelines.corpus.media_types import read_file
from pipelines.corpus.record_files import TableReader
from pipelines.corpus.side_files import below, folder_part
from pipelines.sequence import Modality


class InterleavedReader(TableReader):
    """Base of these readers."""

    decides_rows: ClassVar[frozenset[str]] = TableReader.decides_rows | {"missing_media"}

    media: str | None = None
    """Folder that holds the pictures. Pictures that come to it later are not noticed: only a changed record file is read
    again."""
    missing_media: Literal["reject", "skip"] = "reject"
    """What to do where a picture is not in the folder: quarantine the document, or leave the picture out of it."""
    max_file_mb: float = Field(default=256, gt=0)
    """Documents with a larger picture are quarantined."""

    def picture(self, name: str, uri: str, place: str) -> list[RawSpan]:
        """The picture of this name below `media`; none where it is missing and may be.

        Raises:
            RecordError: it cannot be had.
        """
        if self.media is None:
            message = f"{place}: names the picture {name!r:.200}; set `media` to the folder that holds it"
            raise RecordError("media: not in the record", message)
        try:
            data = read_file(below(folder_part(self.media), name), self.max_file_mb)
        except RecordError as error:
            missing = isinstance(error.__cause__, FileNotFoundError)
            if missing and self.missing_media == "skip":
                return []
            raise RecordError("media: missing" if missing else error.reason, f"{place}: {error}") from error
        return [RawSpan(modality=Modality.IMAGE, data=data, uri=uri)]

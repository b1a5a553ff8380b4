"""Files that exactly one process creates: what exactly-once rests on where there is no table.

Enters: a path and its whole content. Leaves: the file, or word that another was there first. Always holds: a file is visible
under its name only when all of it is on the disk, and of several processes, on one machine or on several that share a folder
over NFS, one succeeds. `open` with O_EXCL would do on one machine; it shows a file before its content is there.
"""

from __future__ import annotations

import os
import socket
import uuid
from pathlib import Path

from pipelines.shards.storage import naming_a_full_disk, sync


def create_exclusively(file: Path, content: bytes) -> bool:
    """Create a file with its content; False, and nothing done, if it is there already.

    Raises:
        DiskFullError: nothing was created.
        OSError: among others where the file system knows no hard links.
    """
    with naming_a_full_disk(file.parent):
        file.parent.mkdir(parents=True, exist_ok=True)
        # The host's name, because process ids and random numbers of cloned machines may agree.
        own = file.with_name(f".{file.name}.{socket.gethostname()}.{uuid.uuid4().hex[:12]}")
        try:
            own.write_bytes(content)
            sync(own)
            try:
                os.link(own, file)
            except FileExistsError:
                # Over NFS the answer to a link that was made may be lost and the link tried again; the count tells.
                return own.stat().st_nlink == 2
            sync(file.parent)
            return True
        finally:
            own.unlink(missing_ok=True)

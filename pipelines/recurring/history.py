"""What a pipeline did, from its records: a table, JSON, and the page.

Enters: the state folder. Leaves: rows. Always holds: the records are the truth; everything here can be made again from them.
"""

from __future__ import annotations

from pathlib import Path

from pipelines.recurring.state import State


def write_page(state: State, name: str, out: Path | None = None) -> Path:
    """Write the page of a pipeline; `history.html` in its state folder by default."""
    return out or state.page

"""Raw files to documents of raw spans: `Source` is what a recipe may name, one small module a reader."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipelines.corpus.sources import Source as Source


def __getattr__(name: str) -> Any:
    # Late, because decoding pictures and sounds, of which training a tokenizer consists, must not need pydantic.
    if name == "Source":
        from pipelines.corpus.sources import Source

        return Source
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

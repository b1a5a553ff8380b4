"""Text is told as it comes, and what was told is the text in the end."""

from __future__ import annotations

import pytest

from pipelines.generate import Generator, Request
from pipelines.generate.continuation import Continuation
from pipelines.generate.prompt import encode_prompt
from pipelines.generate.request import wishes
from pipelines.generate.streaming import TextStream
from tests.pipelines.generate.parts import CONTEXT


@pytest.mark.parametrize("want", ["text", ["text", "image", "text"]], ids=str)
def test_streamed_text_is_the_text_in_the_end(generator: Generator, want: str | list[str]) -> None:
    told: dict[int, list[str]] = {}
    request = Request(want=want, samples=4, max_tokens=25, batch_size=3)
    samples = generator.generate(
        ["the fox", ""], request, on_text=lambda index, text: told.setdefault(index, []).append(text)
    )
    for index, sample in enumerate(samples):
        assert "".join(told[index]) == "".join(span.text or "" for span in sample.spans)
    assert max(len(parts) for parts in told.values()) > 3


def test_half_a_character_is_never_told(generator: Generator) -> None:
    text, vocabulary = generator.tokenizers.text, generator.vocabulary
    prompt = encode_prompt("", vocabulary, generator.tokenizers)
    row = Continuation(vocabulary, prompt, wishes(Request(), vocabulary, frame_rate_hz=1, whose="tiny"), CONTEXT)
    told: list[str] = []
    stream = TextStream([row], text.decode, lambda index, new: told.append(new))
    for piece in text.encode(["\N{SNOWMAN} \N{CAT FACE}!"])[0].tolist():
        row.take(piece)
        stream.piece(0, piece)
    stream.close()
    assert told == ["\N{SNOWMAN}", " ", "\N{CAT FACE}", "!"]


def test_a_watcher_hears_of_every_token_it_was_promised(generator: Generator) -> None:
    class Count:
        promised = heard = 0

        def started(self, tokens: int) -> None:
            self.promised = tokens

        def advanced(self, tokens: int) -> None:
            self.heard += tokens

    count = Count()
    generator.generate(["the fox"], Request(want="image", samples=3), count)
    assert count.promised == count.heard == 3 * (3 + 16 + 1)

"""One document being generated: its tokens so far, and what may come next.

Enters: a prompt's tokens and the wishes. Leaves: at every position the ids that may stand there, until the document is
closed. Always holds: the tokens are a beginning of a document by `pipelines.sequence.Grammar`, and the whole of it fits
the context.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence

from pipelines.generate.errors import GenerateError
from pipelines.generate.prompt import EncodedPrompt
from pipelines.generate.request import Wish
from pipelines.sequence import MAX_NUMBER, Allowed, Grammar, Modality, Vocabulary

Script = Generator[Allowed, int, None]
"""Gives what may come next, is sent what came."""


class Continuation:
    """Walks the grammar, narrowed to the wishes: what leaves no choice is a range of one id."""

    def __init__(self, vocabulary: Vocabulary, prompt: EncodedPrompt, wishes: Sequence[Wish], context: int) -> None:
        """Begin after a prompt.

        Args:
            context: the most tokens that the document may have, `<|end|>` included.

        Raises:
            GenerateError: prompt and wishes do not fit the context.
        """
        self.grammar = Grammar(vocabulary)
        self.token_ids = prompt.token_ids.tolist()
        self.modality_ids = prompt.modality_ids.tolist()
        self.prompt_tokens = len(self.token_ids)
        self.truncated = False
        """Whether a text was cut at its limit rather than ended by the model."""
        self._wishes = list(wishes)
        self._context = context
        self._require_room()
        for token_id, modality in zip(self.token_ids, self.modality_ids, strict=True):
            self.grammar.advance(token_id, modality)
        self._script = self._write()
        self.allowed: Allowed | None = next(self._script)
        """What may come next; None when the document is closed."""

    @property
    def forced(self) -> int | None:
        """The next token, if there is only one that may come."""
        if self.allowed is None or len(self.allowed.ranges) > 1:
            return None
        low, high = self.allowed.ranges[0]
        return low if high == low + 1 else None

    @property
    def most_new_tokens(self) -> int:
        """How many tokens may still come at the most when generation begins."""
        return min(sum(w.most_tokens for w in self._wishes) + 1, self._context - self.prompt_tokens)

    def take(self, token_id: int) -> None:
        """Write the next token, and close the document when all wishes are fulfilled.

        Raises:
            SequenceError: it is not one that may come.
        """
        assert self.allowed is not None, "the document is closed"
        self._append(token_id, self.allowed.modality)
        try:
            self.allowed = self._script.send(token_id)
        except StopIteration:
            self.allowed = None
            if not self.grammar.ended:
                self._append(self.grammar.vocabulary.end, Modality.TEXT)

    def _append(self, token_id: int, modality: Modality) -> None:
        self.grammar.advance(token_id, modality)
        self.token_ids.append(token_id)
        self.modality_ids.append(int(modality))

    def _write(self) -> Script:
        opened = False
        for index, wish in enumerate(self._wishes):
            if wish.modality is Modality.TEXT:
                opened = yield from self._text(index, wish)
                continue
            if not opened:
                yield _only(self._opener(wish.modality))
            opened = False
            yield from self._image_size(index, wish) if wish.modality is Modality.IMAGE else self._frames(index, wish)
            while self.grammar.remaining:
                allowed = self.grammar.allowed
                assert allowed is not None
                yield allowed

    def _text(self, index: int, wish: Wish) -> Generator[Allowed, int, bool]:
        """At least one piece, until the model goes on to what follows; whether it did."""
        v = self.grammar.vocabulary
        rest = self._wishes[index + 1 :]
        following = self._opener(rest[0].modality) if rest else v.end
        first = Allowed(Modality.TEXT, ((0, v.text_pieces),))
        later = Allowed(Modality.TEXT, ((0, v.text_pieces), (following, following + 1)))
        for taken in range(min(wish.limit, self._room(index))):
            if (yield later if taken else first) == following:
                return True
        self.truncated = True
        return False

    def _image_size(self, index: int, wish: Wish) -> Script:
        codes = self._room(index) - 2
        rows = yield self._numbers(wish.rows, codes // (wish.columns or 1))
        yield self._numbers(wish.columns, codes // self._number(rows))

    def _frames(self, index: int, wish: Wish) -> Script:
        codebooks = self.grammar.vocabulary.audio_codebooks
        most = wish.rows or min(wish.limit, (self._room(index) - 2) // codebooks)
        last_high, last_low = (part + 1 for part in divmod(most - 1, MAX_NUMBER))
        exact = wish.rows is not None
        high = yield self._numbers(last_high if exact else None, last_high)
        yield self._numbers(last_low if exact else None, last_low if self._number(high) == last_high else MAX_NUMBER)

    def _numbers(self, exact: int | None, most: int) -> Allowed:
        """Number tokens: the exact one, or 1 to `most`."""
        v = self.grammar.vocabulary
        if exact is not None:
            return _only(v.number(exact))
        return Allowed(Modality.TEXT, ((v.number(1), v.number(min(most, MAX_NUMBER)) + 1),))

    def _number(self, token_id: int) -> int:
        return token_id - self.grammar.vocabulary.number(1) + 1

    def _opener(self, modality: Modality) -> int:
        v = self.grammar.vocabulary
        return v.image if modality is Modality.IMAGE else v.audio

    def _room(self, index: int) -> int:
        """Tokens that may still be written before what follows the wish must begin."""
        following = sum(wish.least_tokens for wish in self._wishes[index + 1 :])
        return self._context - len(self.token_ids) - following - 1

    def _require_room(self) -> None:
        least = sum(wish.least_tokens for wish in self._wishes) + 1
        total = self.prompt_tokens + least
        if total <= self._context:
            return
        wanted = " and ".join(_describe(wish) for wish in self._wishes)
        remedy = (
            f"shorten the prompt to {self._context - least:,} tokens"
            if self._context > least
            else "ask for less (rows, columns, seconds)"
        )
        raise GenerateError(
            f"prompt: {self.prompt_tokens:,} tokens, and {wanted} with <|end|> need {least:,} more: {total:,} over the "
            f"model's context of {self._context:,} (max_sequence_length); {remedy}"
        )


def _only(token_id: int) -> Allowed:
    return Allowed(Modality.TEXT, ((token_id, token_id + 1),))


def _describe(wish: Wish) -> str:
    if wish.modality is Modality.TEXT:
        return "text"
    if wish.modality is Modality.IMAGE:
        return f"an image of {wish.rows or 'any'} x {wish.columns or 'any'} codes"
    return f"audio of {wish.rows:,} frames x {wish.columns} codes" if wish.rows else "audio"

"""The loop that makes tokens: a batch of continuations, one cache.

Enters: continuations whose prompts may differ in length and that may want different things. Leaves: all of them closed.
Always holds: every token was chosen among what its continuation allowed, by the head of its modality. While all rows
are inside media spans of one kind, which is nearly always, nothing waits for the device: such a stretch is one loop.

With guidance every row has a shadow, the same document without the prompt, in the second half of the batch: it is fed the
same tokens, and its logits say what the prompt changes.

Shapes: B rows, D hidden, V ids that may stand at a position.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from model import KeyValueCache, UnifiedTransformer
from model.decode import LEAST_STEPS, DecodingStep, step_unavailable
from pipelines.generate.choosing import Chooser
from pipelines.generate.continuation import Continuation
from pipelines.generate.errors import GenerateError
from pipelines.generate.request import Request
from pipelines.sequence import Allowed, Modality

REPORT_EVERY = 16
"""Steps between two calls of the watcher within a stretch."""

FINITE_EVERY = 16
"""Tokens after which it is looked whether the model still computes numbers."""


class Watcher(Protocol):
    """Is told of progress."""

    def started(self, tokens: int) -> None:
        """Generation begins; it will take at most so many tokens."""

    def advanced(self, tokens: int) -> None:
        """So many tokens are new."""


Listener = Callable[[int, int], None]
"""Is told each text piece as it is chosen: the row's index in the batch, and the id."""


class Decoding:
    """Continues all rows of a batch to their ends."""

    def __init__(
        self,
        model: UnifiedTransformer,
        rows: Sequence[Continuation],
        seeds: Sequence[int],
        request: Request,
        watcher: Watcher | None = None,
        listener: Listener | None = None,
    ) -> None:
        """Allocate the cache and draw all random numbers.

        Args:
            seeds: one a row; a row's draws depend on its own seed alone.
        """
        self._model = model
        self._rows = rows
        self._request = request
        self._watcher, self._listener = watcher, listener
        weight = model.modality_embedding.weight
        self._device = weight.device
        longest = max(row.prompt_tokens + row.most_new_tokens for row in rows)
        self._copies = 2 if request.guided else 1
        """Rows of the model's batch for each row of ours."""
        self._cache = KeyValueCache(model.config, self._copies * len(rows), longest, self._device, weight.dtype)
        # On the CPU, so that a seed means the same on every machine.
        steps = max(row.most_new_tokens for row in rows)
        draws = [torch.rand(steps, dtype=torch.float64, generator=torch.Generator().manual_seed(s)) for s in seeds]
        self._uniforms = torch.stack(draws, dim=1).to(self._device)
        """float64 [steps, B]."""
        self._step = self._reported = 0
        self._alive = torch.ones(self._copies * len(rows), dtype=torch.int64, device=self._device)
        """int64 [B] or [2B]: 1 for rows that go on. A closed row is computed along, but its cache stands still."""
        self._fed: list[int] = []
        """Tokens of each row that the model has read."""
        self._fast: DecodingStep | None = None
        """Where the model and the device allow it, and the tokens are worth its capture; made after the prompts are read."""
        self._going: list[int] = []
        """Indices of the rows that go on."""

    @torch.inference_mode()
    def run(self) -> None:
        """Make tokens until every row is closed.

        Raises:
            GenerateError: the model computes no finite numbers.
        """
        hidden = self._prefill()
        _require_finite(hidden)
        enough = max(row.most_new_tokens for row in self._rows) >= LEAST_STEPS
        if enough and step_unavailable(self._model, self._cache) is None:
            self._fast = DecodingStep(self._model, self._cache, self._alive)
        while True:
            stretch = self._stretch()
            ids, kinds = self._media_codes(hidden, stretch) if stretch else self._one_token(hidden)
            if not self._update_going():
                break
            hidden = self._feed(ids, kinds)
            # Once there, such numbers stay in the cache, so looking now and then is enough.
            if self._step % FINITE_EVERY == 0:
                _require_finite(hidden)
        _require_finite(hidden)
        self._report(self._new_tokens() - self._reported)

    def _new_tokens(self) -> int:
        return sum(len(row.token_ids) - row.prompt_tokens for row in self._rows)

    def _prefill(self) -> Tensor:
        for row in self._rows:
            while (forced := row.forced) is not None:
                row.take(forced)
        self._chooser = Chooser(self._model, self._rows, self._request)
        self._fed = [len(row.token_ids) for row in self._rows]
        self._report(self._new_tokens())
        documents = [(row.token_ids, row.modality_ids) for row in self._rows]
        if self._copies == 2:
            # The first token, `<|document|>`, opens a document without a prompt too.
            for row in self._rows:
                new = slice(row.prompt_tokens, None)
                documents.append(
                    ([row.token_ids[0], *row.token_ids[new]], [row.modality_ids[0], *row.modality_ids[new]])
                )
        lengths = [len(token_ids) for token_ids, _ in documents]
        ids, kinds = torch.zeros(2, len(documents), max(lengths), dtype=torch.int64)
        for b, (token_ids, modality_ids) in enumerate(documents):
            ids[b, : lengths[b]] = torch.tensor(token_ids)
            kinds[b, : lengths[b]] = torch.tensor(modality_ids)
        self._update_going()
        return self._model.prefill(
            ids.to(self._device), kinds.to(self._device), self._cache, torch.tensor(lengths, device=self._device)
        )

    def _update_going(self) -> bool:
        going = [b for b, row in enumerate(self._rows) if row.allowed is not None]
        if going != self._going:
            self._going = going
            self._alive.zero_()
            for copy in range(self._copies):
                self._alive[[copy * len(self._rows) + b for b in going]] = 1
        return bool(going)

    def _feed(self, ids: Tensor, kinds: Tensor) -> Tensor:
        """Let the model read one token a row, int64 [B]; the hidden states [B or 2B, D] that predict the next."""
        if self._fast is not None:
            hidden = self._fast(ids, kinds)
        else:
            ids, kinds = ids.repeat(self._copies), kinds.repeat(self._copies)
            hidden = self._model.hidden_states(ids[:, None], kinds[:, None], cache=self._cache)[:, 0]
            self._cache.advance(1, self._alive)
        for b in self._going:
            self._fed[b] += 1
        self._cache.occupied = max(self._fed)
        return hidden

    def _one_token(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """The next token of every row, wherever each may be: rows that may write the same are sampled together."""
        groups: dict[Allowed, list[int]] = {}
        ids, kinds = torch.zeros(2, len(self._rows), dtype=torch.int64, device=self._device)
        for b in self._going:
            row = self._rows[b]
            assert row.allowed is not None
            groups.setdefault(row.allowed, []).append(b)
        for allowed, members in groups.items():
            kinds[members] = int(allowed.modality)
            if (forced := self._rows[members[0]].forced) is not None:
                ids[members] = forced
            else:
                uniforms = self._uniforms[self._step, members]
                ids[members] = self._chooser.choose(hidden, allowed, uniforms, members)
        self._step += 1
        chosen = ids.tolist()
        for b in self._going:
            row = self._rows[b]
            piece = row.allowed is not None and row.allowed.modality is Modality.TEXT
            row.take(chosen[b])
            if self._listener is not None and piece and chosen[b] < row.grammar.vocabulary.text_pieces:
                self._listener(b, chosen[b])
        self._report(len(self._going))
        return ids, kinds

    def _stretch(self) -> int:
        """For how many tokens all rows will be inside media spans, each at the same codebook; 0 if they are not."""
        first = self._rows[self._going[0]]
        remaining = [self._rows[b].grammar.remaining for b in self._going]
        same = all(self._rows[b].allowed == first.allowed for b in self._going)
        return min(remaining) if same else 0

    def _media_codes(self, hidden: Tensor, steps: int) -> tuple[Tensor, Tensor]:
        """The next codes of every row; all but the last are fed already."""
        first = self._rows[self._going[0]].allowed
        assert first is not None
        cycle = self._ranges_from(first)
        kinds = torch.full((len(self._rows),), int(first.modality), device=self._device)
        codes = torch.empty(steps, len(self._rows), dtype=torch.int64, device=self._device)
        for step in range(steps):
            codes[step] = self._chooser.choose(hidden, cycle[step % len(cycle)], self._uniforms[self._step])
            self._step += 1
            if (step + 1) % REPORT_EVERY == 0:
                self._report(REPORT_EVERY * len(self._going))
            if step + 1 < steps:
                hidden = self._feed(codes[step], kinds)
        self._report(steps % REPORT_EVERY * len(self._going))
        _require_finite(hidden)
        chosen = codes.T.tolist()
        for b in self._going:
            for code in chosen[b]:
                self._rows[b].take(code)
        return codes[-1], kinds

    def _ranges_from(self, first: Allowed) -> list[Allowed]:
        """What is allowed at this position of a media span and at the following ones, as often as it repeats."""
        v = self._rows[0].grammar.vocabulary
        if first.modality is Modality.IMAGE:
            return [first]
        codebook = first.ranges[0][0] // v.audio_codebook_size
        order = ((codebook + k) % v.audio_codebooks for k in range(v.audio_codebooks))
        return [Allowed(Modality.AUDIO, ((q * v.audio_codebook_size, (q + 1) * v.audio_codebook_size),)) for q in order]

    def _report(self, tokens: int) -> None:
        self._reported += tokens
        if self._watcher is not None and tokens:
            self._watcher.advanced(tokens)


def _require_finite(hidden: Tensor) -> None:
    if not bool(hidden.isfinite().all()):
        raise GenerateError("the model computes NaN or infinity: its training diverged; use an earlier checkpoint")

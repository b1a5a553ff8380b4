"""The unified transformer: one decoder over text, image and audio tokens in any order.

In: token ids, each local to its modality's vocabulary, and modality ids (0 text, 1 image, 2 audio). Out: hidden
states, and from them logits, losses, or the next hidden state of a generation. Nothing here knows of data files or of
parallelism; checkpointing, compilation and sharding are put around it from outside.

Shapes: B batch, T tokens, D hidden, V vocabulary of one modality, C capacity of a modality's targets.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.attention import BACKENDS, plan_attention, select_backend
from model.batch import PackedBatch
from model.block import TransformerBlock
from model.cache import KeyValueCache
from model.config import MODALITIES, FlopsConvention, UnifiedTransformerConfig
from model.embedding import embed
from model.fused import runs_fused
from model.heads import head_losses
from model.initialization import initialize
from model.loss import LossOutput, TokenScores, coefficients_of, target_losses, target_scores
from model.prompts import prompt_groups
from model.tokens import check_ids, require_ids

logger = logging.getLogger(__name__)


class UnifiedTransformer(nn.Module):
    """Decoder-only transformer with one embedding table and one head per modality.

    Text logits come from the text embedding itself or from a head of their own (`tie_text_embeddings`).
    """

    def __init__(self, config: UnifiedTransformerConfig, *, seed: int | None = None) -> None:
        """Build and initialize; on the meta device only build.

        Args:
            seed: see `reset_parameters`.
        """
        super().__init__()
        self.config = config
        D = config.hidden_size
        self.embeddings = nn.ModuleDict({name: nn.Embedding(size, D) for name, size in config.vocab_sizes.items()})
        self.modality_embedding = nn.Embedding(len(MODALITIES), D)
        self.position_embedding = None if config.use_rope else nn.Embedding(config.max_sequence_length, D)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(TransformerBlock(config) for _ in range(config.num_layers))
        self.final_norm = nn.LayerNorm(D, config.layer_norm_eps, bias=False)
        self.heads = nn.ModuleDict(
            {
                name: nn.Linear(D, size, bias=False)
                for name, size in config.vocab_sizes.items()
                if name != "text" or not config.tie_text_embeddings
            }
        )
        self._running_backend: str | None = None
        self._running_fused = False
        self._watching = False
        self.reset_parameters(seed)

    def reset_parameters(self, seed: int | None = None) -> None:
        """Initialize all weights in place (`model.initialization`), also after `to_empty` and sharded by FSDP2.

        Args:
            seed: equal seeds give equal weights, however the model is sharded; default: drawn from torch's global
                generator, so that `torch.manual_seed` decides.
        """
        if seed is None:
            seed = int(torch.randint(2**62, (), device="cpu"))
        initialize(self, self.config, seed)

    def num_parameters(self) -> int:
        """Parameters, counted on the modules themselves; tied weights count once."""
        return sum(parameter.numel() for parameter in self.parameters())

    def flops_per_token(
        self,
        sequence_length: int,
        convention: FlopsConvention = "full",
        target_shares: Mapping[str, float] | None = None,
    ) -> float:
        """See `UnifiedTransformerConfig.flops_per_token`."""
        return self.config.flops_per_token(sequence_length, convention, target_shares)

    @property
    def attention_backend(self) -> str | None:
        """Name of the attention backend that ran last; None before the first forward pass."""
        return self._running_backend

    @property
    def block_backend(self) -> str | None:
        """How the blocks ran last, "fused" or "torch"; None before the first forward pass."""
        return None if self._running_backend is None else "fused" if self._running_fused else "torch"

    def attention_backend_for(self, device: torch.device, dtype: torch.dtype) -> str:
        """Name of the attention backend that runs there without a cache.

        Args:
            dtype: the type computed in, which under autocast and FSDP2's mixed precision is not that of the weights.

        Raises:
            AttentionBackendError: the configured backend cannot run there.
        """
        return select_backend(self.config, device, dtype)

    def forward(self, token_ids: Tensor, modality_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Image and audio logits at every position; text logits are a method of their own.

        Args:
            token_ids: integer [B, T].
            modality_ids: integer [B, T].

        Returns:
            image_logits [B, T, image_vocab_size] and audio_logits [B, T, audio_vocab_size].
        """
        hidden = self.hidden_states(token_ids, modality_ids)
        return self.image_logits(hidden), self.audio_logits(hidden)

    def hidden_states(
        self,
        token_ids: Tensor,
        modality_ids: Tensor,
        *,
        positions: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        cache: KeyValueCache | None = None,
    ) -> Tensor:
        """Hidden states after the final LayerNorm.

        Args:
            token_ids: [B, T] of any integer type.
            modality_ids: [B, T] of any integer type.
            positions: integer [B, T], index of each token in its document; by default what the other arguments imply.
            cu_seqlens: int32, document starts in the flattened B*T as in `PackedBatch`; by default a row is a document.
            max_seqlen: no document is longer; default T.
            cache: what the rows held before. New keys and values are written to it, but not yet counted: `prefill` and
                `decode_step` do both.

        Returns:
            [B, T, D].

        Raises:
            TokenError: ids of a wrong shape or type; or an id is out of range, on the CPU and not compiled. Elsewhere
                call `check_tokens`, which waits for the device.
            AttentionBackendError: the configured backend cannot run here.
            CacheError: the cache does not fit the batch.
        """
        token_ids, modality_ids = self._checked(token_ids, modality_ids)
        if cache is not None:
            cache.require_room(*token_ids.shape)
        return self._through_blocks(
            token_ids, modality_ids, positions=positions, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen, cache=cache
        )

    def _checked(self, token_ids: Tensor, modality_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Both as int64, or the errors that `hidden_states` names."""
        require_ids(token_ids, modality_ids)
        T = token_ids.shape[1]
        if self.config.max_sequence_length < T:
            raise ValueError(
                f"a row has {T} tokens: the model is made for at most {self.config.max_sequence_length} "
                "(max_sequence_length)"
            )
        token_ids, modality_ids = token_ids.long(), modality_ids.long()
        # The check branches on values, which would break the graph of a compiled model.
        if token_ids.device.type == "cpu" and not torch.compiler.is_compiling():
            self.check_tokens(token_ids, modality_ids)
        return token_ids, modality_ids

    def _through_blocks(
        self,
        token_ids: Tensor,
        modality_ids: Tensor,
        *,
        positions: Tensor | None,
        cu_seqlens: Tensor | None,
        max_seqlen: int | None,
        cache: KeyValueCache | None = None,
        rows: Tensor | None = None,
    ) -> Tensor:
        """Hidden states of checked ids; with `rows` (see `model.cache.LayerCache`) the cache is written and not read."""
        tables = [self.embeddings[name].get_parameter("weight") for name in MODALITIES]
        x = embed(token_ids, modality_ids, self.modality_embedding.weight, tables)
        held = cache if rows is None else None
        plan = plan_attention(
            self.config, x, positions=positions, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen, cache=held
        )
        plan.fused = held is None and not self._watching and runs_fused(self.config, x, self.training)
        if not self._watching:
            self._announce(plan.backend, plan.fused)
        if self.position_embedding is not None:
            x = x + self.position_embedding(plan.positions)
        x = self.dropout(x)
        for i, block in enumerate(self.blocks):
            x = block(x, plan, None if cache is None else cache.layer(i, token_ids.shape[1], rows))
        return self.final_norm(x)

    def _announce(self, backend: str, fused: bool) -> None:
        if (backend, fused) != (self._running_backend, self._running_fused):
            self._running_backend, self._running_fused = backend, fused
            if not torch.compiler.is_compiling():  # a graph holds no logging
                logger.info("attention backend: %s, blocks: %s", backend, "fused" if fused else "torch")

    def check_tokens(self, token_ids: Tensor, modality_ids: Tensor) -> None:
        """Verify that every id is in range. It waits for the device, so on a GPU keep it out of the training loop.

        Raises:
            TokenError: naming the first offending id and where it is.
        """
        check_ids(token_ids, modality_ids, self.config.vocab_sizes)

    def head_weight(self, modality: str) -> Tensor:
        """The matrix [V, D] that turns hidden states into logits of a modality."""
        tied = modality == "text" and self.config.tie_text_embeddings
        module = self.embeddings[modality] if tied else self.heads[modality]
        return module.get_parameter("weight")

    def text_logits(self, hidden: Tensor) -> Tensor:
        """[..., D] to [..., text_vocab_size], in the compute type."""
        return F.linear(hidden, self.head_weight("text"))

    def image_logits(self, hidden: Tensor) -> Tensor:
        """[..., D] to [..., image_vocab_size], in the compute type."""
        return F.linear(hidden, self.head_weight("image"))

    def audio_logits(self, hidden: Tensor) -> Tensor:
        """[..., D] to [..., audio_vocab_size], in the compute type."""
        return F.linear(hidden, self.head_weight("audio"))

    def _predicting(self, batch: PackedBatch) -> Tensor:
        """Hidden states [B*T, D] of a batch."""
        return self.hidden_states(
            batch.token_ids,
            batch.modality_ids,
            positions=batch.positions,
            cu_seqlens=batch.cu_seqlens,
            max_seqlen=batch.max_seqlen,
        ).flatten(0, 1)

    @torch.no_grad()
    def token_losses(self, batch: PackedBatch) -> dict[str, Tensor]:
        """Negative log likelihood of every target, by modality; without gradient.

        Returns:
            By modality name: float32 [C] in nats (float64 for a float64 model), in the order of `batch.targets`, 0 in
            padded slots. Logits exist only at target positions, `config.loss_chunk_tokens` rows at a time.
        """
        hidden = self._predicting(batch)
        return {
            name: target_losses(hidden, batch.targets[name], self.head_weight(name), self.config.loss_chunk_tokens)
            for name in MODALITIES
        }

    @torch.no_grad()
    def token_scores(self, batch: PackedBatch) -> dict[str, TokenScores]:
        """`token_losses`, and with each loss the target's rank and the model's confidence."""
        hidden = self._predicting(batch)
        return {
            name: target_scores(hidden, batch.targets[name], self.head_weight(name), self.config.loss_chunk_tokens)
            for name in MODALITIES
        }

    def loss(
        self,
        batch: PackedBatch,
        *,
        weights: Mapping[str, float] | None = None,
        denominators: Mapping[str, float | Tensor] | None = None,
        row_groups: Tensor | None = None,
        group_count: int = 1,
    ) -> LossOutput:
        """The training loss; every parameter gets a gradient from it, whatever modalities the batch holds.

        A weighted mean over target tokens; `model.loss` defines weights, denominators and normalisation.
        Under FSDP2 register this method with `register_fsdp_forward_method`.

        Args:
            weights: of each modality's targets, default 1.
            denominators: valid targets by modality in the whole optimizer step, over ranks and accumulated batches;
                default those of this batch.
            row_groups: int64 [B]: the group of each row, below `group_count`, for `group_sums`; None makes them one.
        """
        counts = {name: batch.targets[name].count for name in MODALITIES}
        hidden = self._predicting(batch)
        coefficients = coefficients_of(counts if denominators is None else denominators, weights, hidden)
        groups = None if row_groups is None else row_groups.repeat_interleave(batch.token_ids.shape[1])
        total, losses, squares, by_group = head_losses(
            hidden,
            [batch.targets[name] for name in MODALITIES],
            [self.head_weight(name) for name in MODALITIES],
            coefficients,
            self.config.z_loss_weight,
            self.config.loss_chunk_tokens,
            groups,
            group_count,
        )
        z_loss = self.config.z_loss_weight * (coefficients * squares).sum()
        sums, by_square = (dict(zip(MODALITIES, each.unbind(), strict=True)) for each in (losses, squares))
        return LossOutput(total, sums, counts, z_loss, by_square, by_group)

    @torch.no_grad()
    def attention_peaks(self, batch: PackedBatch) -> Tensor:
        """The largest attention logit of each layer, float32 [layers], over the first row of a batch.

        It runs the blocks as plain PyTorch. Under FSDP2 register it with `register_fsdp_forward_method`.
        """
        self._watching = True
        for block in self.blocks:
            block.attention.watching = True  # type: ignore[union-attr]
        try:
            # A compiled block could not hand its peak out, least of all one that is recomputed.
            with torch.compiler.set_stance("force_eager"):
                self._predicting(batch)
            return torch.stack([block.attention.peak for block in self.blocks])  # type: ignore[union-attr, misc]
        finally:
            self._watching = False
            for block in self.blocks:
                block.attention.watching, block.attention.peak = False, None  # type: ignore[union-attr]

    @torch.no_grad()
    def prefill(
        self, token_ids: Tensor, modality_ids: Tensor, cache: KeyValueCache, lengths: Tensor | None = None
    ) -> Tensor:
        """Read prompts of different lengths into the cache.

        Args:
            token_ids: integer [B, T], each prompt at the left of its row; what stands to its right is ignored, but must
                be in range.
            modality_ids: integer [B, T].
            cache: may already hold earlier tokens; these follow them.
            lengths: integer [B] in 1..T, the prompts' lengths; default all T.

        Returns:
            [B, D]: the hidden state of each prompt's last token, which predicts the next one.
        """
        if cache.occupied == 0:
            return self._read_prompts(token_ids, modality_ids, cache, lengths)
        hidden = self.hidden_states(token_ids, modality_ids, cache=cache)
        cache.advance(token_ids.shape[1], lengths)
        if lengths is None:
            return hidden[:, -1]
        return hidden[torch.arange(hidden.shape[0], device=hidden.device), lengths - 1]

    def _read_prompts(
        self, token_ids: Tensor, modality_ids: Tensor, cache: KeyValueCache, lengths: Tensor | None
    ) -> Tensor:
        """`prefill` of an empty cache: prompts see themselves alone, as documents do in training."""
        token_ids, modality_ids = self._checked(token_ids, modality_ids)
        B, T = token_ids.shape
        cache.require_room(B, T)
        weight = self.modality_embedding.weight
        kind = weight.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
        packed = BACKENDS[self.attention_backend_for(weight.device, dtype)].packed
        counts = [T] * B if lengths is None else lengths.tolist()
        last = []
        for group in prompt_groups(token_ids, modality_ids, counts, packed=packed):
            hidden = self._through_blocks(
                group.token_ids, group.modality_ids, positions=group.positions, cu_seqlens=group.cu_seqlens,
                max_seqlen=group.max_seqlen, cache=cache, rows=group.rows,
            )  # fmt: skip
            last.append(hidden[group.last])
        cache.advance(T, lengths)
        return torch.cat(last)

    def decode_step(self, token_ids: Tensor, modality_ids: Tensor, cache: KeyValueCache) -> Tensor:
        """Read one more token a row, integer [B], and return the hidden state [B, D] that predicts the next."""
        return self.prefill(token_ids[:, None], modality_ids[:, None], cache)

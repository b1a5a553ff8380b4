"""A trained model with its tokenizers, ready to continue prompts.

Enters: a checkpoint, prompts and a `Request`. Leaves: `Sample`s. Always holds: model, vocabulary and tokenizers agree, and
equal seed, settings and machine give equal bytes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from model import UnifiedTransformer
from pipelines.corpus.pictures import PICTURE_PREPROCESSING_VERSION
from pipelines.corpus.sounds import SOUND_PREPROCESSING_VERSION
from pipelines.decode import DecodedSpan, decode
from pipelines.generate.continuation import Continuation
from pipelines.generate.decoding import Decoding, Watcher
from pipelines.generate.errors import GenerateError
from pipelines.generate.output import Sample
from pipelines.generate.prompt import EncodedPrompt, Prompt, encode_prompt
from pipelines.generate.request import Request, wishes
from pipelines.generate.streaming import OnText, TextStream
from pipelines.interleave import Sequence as TokenSequence
from pipelines.interleave import extract
from pipelines.pretrain.export import load_model
from pipelines.sequence import Modality, Vocabulary
from pipelines.tokenize.recipe import TokenizerSettings
from pipelines.tokenize.tokenizers import Tokenizers
from pipelines.tokenizers.encodec import AudioTokenizer
from pipelines.tokenizers.sentencepiece import TextTokenizer
from pipelines.tokenizers.vqgan import ImageTokenizer


class Generator:
    """Continues prompts of text, pictures and sounds with text, pictures and sounds."""

    def __init__(
        self, model: UnifiedTransformer, vocabulary: Vocabulary, tokenizers: Tokenizers, *, name: str = "the model"
    ) -> None:
        """Put a model and its tokenizers together; the model computes in the type and on the device it has.

        Args:
            name: what errors and records call the checkpoint.

        Raises:
            VocabularyError: the tokenizers are not those that the vocabulary was made with; it lists what differs.
            GenerateError: the model's tables are smaller than the vocabulary.
        """
        vocabulary.require_same(_at_hand(vocabulary, tokenizers), this=name, that="the tokenizers at hand")
        for modality in Modality:
            rows, size = model.config.vocab_sizes[modality.label], vocabulary.size(modality)
            if rows < size:
                raise GenerateError(
                    f"{name}: the model has {rows:,} {modality.label} ids, its vocabulary {size:,}; export it again"
                )
        self.model = model.eval()
        self.vocabulary = vocabulary
        self.tokenizers = tokenizers
        self.name = name
        self.about: dict[str, Any] = {}
        """What the checkpoint says of itself, where it came from one."""

    @classmethod
    def load(
        cls, checkpoint: str | Path, *, device: str | None = None, tokenizers: Tokenizers | None = None
    ) -> Generator:
        """Load an exported model, and the tokenizers that it names.

        Args:
            checkpoint: a run's folder, or the model's folder in it.
            device: default the GPU if there is one. Computes in bfloat16 on CUDA and in float32 elsewhere.
            tokenizers: use these instead.

        Raises:
            GenerateError: the device is unknown or not here, or no tokenizers are named.
            CheckpointError: no model there, or a damaged one; or a tokenizer that it names is missing or broken.
            VocabularyError: a tokenizer is no longer the one that the model was trained with.
        """
        if device is None:
            device = "cuda" if torch.cuda.is_available() else "cpu"
        _require_device(device)
        model, vocabulary, about = load_model(checkpoint, device)
        if torch.device(device).type == "cuda":
            model = model.to(torch.bfloat16)
        if tokenizers is None:
            if not about.get("tokenizers"):
                raise GenerateError(f"{checkpoint}: braid.json names no tokenizers; pass them as `tokenizers`")
            settings = TokenizerSettings.model_validate(about["tokenizers"])
            tokenizers = _load_tokenizers(settings, vocabulary, device)
        generator = cls(model, vocabulary, tokenizers, name=str(checkpoint))
        generator.about = about
        return generator

    def generate(
        self,
        prompts: Sequence[Prompt],
        request: Request,
        watcher: Watcher | None = None,
        on_text: OnText | None = None,
    ) -> list[Sample]:
        """Continue each prompt `request.samples` times.

        Args:
            prompts: may differ in length and kind; `[""]` generates unconditionally.
            on_text: is told the text as it comes: the sample's index in what is returned, and what is new of its text.

        Returns:
            The samples of the first prompt, then those of the second, and so on.

        Raises:
            GenerateError: it cannot be made; the message names place, value and remedy.
        """
        audio = self.tokenizers.audio
        wanted = wishes(request, self.vocabulary, frame_rate_hz=audio.frame_rate_hz if audio else 0.0, whose=self.name)
        encoded = [encode_prompt(prompt, self.vocabulary, self.tokenizers) for prompt in prompts]
        tasks = [(prompt, index) for prompt in encoded for index in range(request.samples)]
        context = self.model.config.max_sequence_length
        rows = [Continuation(self.vocabulary, prompt, wanted, context) for prompt, _ in tasks]
        seeds = [_seed(request.seed, prompt, index) for prompt, index in tasks]
        if watcher is not None:
            watcher.started(sum(row.most_new_tokens for row in rows))
        for start in range(0, len(rows), request.batch_size):
            batch = slice(start, start + request.batch_size)
            stream = TextStream(rows[batch], self.tokenizers.text.decode, on_text, start) if on_text else None
            Decoding(self.model, rows[batch], seeds[batch], request, watcher, stream.piece if stream else None).run()
            if stream:
                stream.close()
        return [self._sample(row, prompt, index) for row, (prompt, index) in zip(rows, tasks, strict=True)]

    def settings(self, request: Request) -> dict[str, Any]:
        """All that decided the samples but their prompts, as JSON values: what `write` puts beside them."""
        weight = self.model.modality_embedding.weight
        return {
            "checkpoint": self.name,
            "step": self.about.get("step"),
            "fingerprint": self.vocabulary.fingerprint,
            **request.to_json(),
            "device": weight.device.type,
            "precision": str(weight.dtype).removeprefix("torch."),
            "torch": torch.__version__,
        }

    def _sample(self, row: Continuation, prompt: EncodedPrompt, index: int) -> Sample:
        sequence = TokenSequence(
            token_ids=np.array(row.token_ids, np.int32),
            modality_ids=np.array(row.modality_ids, np.int8),
            spans=row.grammar.spans,
        )
        return Sample(
            index=index,
            prompt=prompt.items,
            sequence=sequence,
            prompt_tokens=row.prompt_tokens,
            truncated=row.truncated,
            spans=self._decode(sequence, row.prompt_tokens),
        )

    def _decode(self, sequence: TokenSequence, prompt_tokens: int) -> list[DecodedSpan]:
        """The generated spans; of a text span that the prompt began, what was added."""
        new = [span for span in sequence.spans if span.start + span.length > prompt_tokens]
        decoded = decode([extract(self.vocabulary, sequence.token_ids, span) for span in new], self.tokenizers)
        if new[0].start < prompt_tokens:
            begun = self.tokenizers.text.decode(sequence.token_ids[new[0].start : prompt_tokens])
            # Decoded together and then cut: pieces decoded alone lose the space in front of them.
            assert decoded[0].text is not None
            decoded[0] = replace(decoded[0], text=decoded[0].text[len(begun) :])
        return decoded


def _seed(seed: int, prompt: EncodedPrompt, index: int) -> int:
    """Of one row: independent of what else is in its batch."""
    digest = hashlib.sha256(f"{seed}/{index}/".encode())
    digest.update(prompt.token_ids.tobytes() + prompt.modality_ids.tobytes())
    return int.from_bytes(digest.digest()[:8], "little") >> 1


def _require_device(name: str) -> None:
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise GenerateError(f"device is {name!r}: torch knows no such device; choose cpu or cuda") from error
    here = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    present = here is not None and device.type == here.type and (device.index or 0) < torch.accelerator.device_count()
    if device.type != "cpu" and not present:
        raise GenerateError(
            f"device is {name!r}: torch {torch.__version__} sees no such device here; use cpu, or leave device out"
        )


def _load_tokenizers(settings: TokenizerSettings, vocabulary: Vocabulary, device: str) -> Tokenizers:
    """Those that the vocabulary needs; of the audio codebooks, as many as the model was trained on."""
    image, audio = settings.image, settings.audio
    return Tokenizers(
        text=TextTokenizer.load(settings.text.model),
        image=ImageTokenizer.load(image.checkpoint, device=device) if image and vocabulary.image_vocab_size else None,
        audio=(
            AudioTokenizer.load(audio.checkpoint, n_q=vocabulary.audio_codebooks, device=device)
            if audio and vocabulary.audio_vocab_size
            else None
        ),
    )


def _at_hand(vocabulary: Vocabulary, tokenizers: Tokenizers) -> Vocabulary:
    """The vocabulary that these tokenizers and this version of the preprocessing make of the same settings."""
    text, image, audio = tokenizers.text, tokenizers.image, tokenizers.audio
    versions = {"image": PICTURE_PREPROCESSING_VERSION, "audio": SOUND_PREPROCESSING_VERSION}
    return replace(
        vocabulary,
        text_pieces=text.pieces,
        text_sha256=text.sha256,
        image_codebook_size=image.codebook_size if image else 0,
        image_sha256=image.sha256 if image else "",
        audio_codebook_size=audio.codebook_size if audio else 0,
        audio_codebooks=audio.n_q if audio else 0,
        audio_sha256=audio.sha256 if audio else "",
        preprocessing={
            name: {**made_with, "version": versions[name]} for name, made_with in vocabulary.preprocessing.items()
        },
    )

"""The three tokenizers of a recipe, loaded together, and the vocabulary they make."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from pipelines.corpus.pictures import PICTURE_PREPROCESSING_VERSION
from pipelines.corpus.sounds import SOUND_PREPROCESSING_VERSION
from pipelines.interleave import MEDIA_OPENING
from pipelines.recipe import RecipeError
from pipelines.sequence import Vocabulary
from pipelines.tokenize.prepare import Shapes
from pipelines.tokenize.recipe import DOCUMENT_MARKS, TokenizeRecipe
from pipelines.tokenizers.encodec import AudioTokenizer
from pipelines.tokenizers.sentencepiece import TextTokenizer
from pipelines.tokenizers.vqgan import ImageTokenizer


@dataclass(frozen=True, kw_only=True, slots=True)
class Tokenizers:
    """One tokenizer a modality; None where the recipe names none."""

    text: TextTokenizer
    image: ImageTokenizer | None
    audio: AudioTokenizer | None

    @classmethod
    def load(cls, recipe: TokenizeRecipe, device: str = "cpu") -> Tokenizers:
        """Load what the recipe names; on a CPU, which need not be where they encode, in float32.

        Raises:
            CheckpointError: a tokenizer is missing or broken.
            RecipeError: the recipe asks of a tokenizer what it cannot do.
        """
        settings = recipe.tokenizers
        audio = None
        if settings.audio:
            audio = AudioTokenizer.load(
                settings.audio.checkpoint,
                n_q=settings.audio.n_q,
                device=device,
                dtype="float32" if device == "cpu" else settings.audio.dtype,
            )
            tokens = settings.audio.max_frames * audio.n_q + DOCUMENT_MARKS + MEDIA_OPENING
            if tokens > recipe.sequence_length:
                raise RecipeError(
                    f"tokenizers.audio.max_frames = {settings.audio.max_frames}: with {audio.n_q} codebooks a span takes "
                    f"{tokens} tokens, over sequence_length {recipe.sequence_length}; lower max_frames or n_q"
                )
        image = None
        if settings.image:
            dtype = torch.float32 if device == "cpu" else getattr(torch, settings.image.dtype)
            image = ImageTokenizer.load(settings.image.checkpoint, device, dtype)
        return cls(text=TextTokenizer.load(settings.text.model, settings.text.engine), image=image, audio=audio)

    @property
    def shapes(self) -> Shapes:
        """What they take."""
        return Shapes(
            downsampling=self.image.downsampling if self.image else None,
            sample_rate_hz=self.audio.sample_rate_hz if self.audio else None,
            hop=self.audio.hop if self.audio else None,
        )

    def vocabulary(self, recipe: TokenizeRecipe) -> Vocabulary:
        """What the ids made with these tokenizers and this recipe mean."""
        preprocessing: dict[str, dict[str, object]] = {}
        image, audio = recipe.tokenizers.image, recipe.tokenizers.audio
        if image:
            preprocessing["image"] = {
                "version": PICTURE_PREPROCESSING_VERSION,
                "rows": image.rows,
                "columns": image.columns,
                "fit": image.fit,
                "background": list(image.background),
            }
        if audio:
            preprocessing["audio"] = {
                "version": SOUND_PREPROCESSING_VERSION,
                "loudness_db": audio.loudness_db,
                "max_frames": audio.max_frames,
            }
        return Vocabulary(
            text_pieces=self.text.pieces,
            text_sha256=self.text.sha256,
            image_codebook_size=self.image.codebook_size if self.image else 0,
            image_sha256=self.image.sha256 if self.image else "",
            audio_codebook_size=self.audio.codebook_size if self.audio else 0,
            audio_codebooks=self.audio.n_q if self.audio else 0,
            audio_sha256=self.audio.sha256 if self.audio else "",
            preprocessing=preprocessing,
        )

"""The recipe of a tokenize job."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from pipelines.corpus.colour import WHITE
from pipelines.corpus.pictures import MAX_PIXELS
from pipelines.corpus.sources import Source
from pipelines.interleave import MEDIA_OPENING
from pipelines.recipe import Settings
from pipelines.sequence import MAX_FRAMES, MAX_NUMBER

DOCUMENT_MARKS = 2
"""`<|document|>` and `<|end|>`."""


Channel = Annotated[int, Field(ge=0, le=255)]


class TextTokenizerSettings(Settings):
    model: str = "mistral-v1"
    """A SentencePiece `.model` file, or the name of a packaged one."""
    engine: Literal["auto", "gigatoken", "sentencepiece"] = "auto"
    """Who encodes: `auto` takes gigatoken where its ids are the sentencepiece library's own, and that library elsewhere."""
    max_characters: int = Field(10_000_000, ge=1)
    """Documents with a longer text are quarantined: one without spaces takes some 60 bytes of memory a character."""


class ImageTokenizerSettings(Settings):
    checkpoint: str = "drawings"
    """A tokenizer's folder, or the name of a shipped one."""
    rows: int = Field(16, ge=1, le=MAX_NUMBER)
    """Rows of codes: every picture is scaled to rows x columns codes, or to at most so many (`fit`)."""
    columns: int = Field(16, ge=1, le=MAX_NUMBER)
    fit: Literal["pad", "crop", "buckets"] = "pad"
    """`pad` shows the whole picture on the background; `crop` fills the frame and cuts what sticks out. `buckets` gives
    each picture that one of at most 15 shapes of up to rows x columns codes whose aspect is nearest its own, and cuts
    the little that then sticks out."""
    background: tuple[Channel, Channel, Channel] = WHITE
    """Red, green and blue, 0 to 255, under transparent pixels and around padded pictures."""
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """Of encoding on a GPU. float16 is several times as fast and gives some codes in a thousand others: see the
    tokenizer's card, and `braid tokenizer check`."""
    max_pixels: int = Field(MAX_PIXELS, ge=1, le=MAX_PIXELS)
    """Larger pictures are quarantined: decoding takes up to 25 bytes of memory a pixel."""


class AudioTokenizerSettings(Settings):
    checkpoint: str = "speech"
    n_q: int | None = Field(None, ge=1)
    """Codebooks to use; all of the checkpoint's by default."""
    max_frames: int = Field(MAX_FRAMES, ge=1, le=MAX_FRAMES)
    """Longer audio becomes several spans of at most so many frames."""
    max_seconds: float = Field(3600.0, gt=0)
    """Longer files are quarantined: a second takes 4 bytes of memory a sample."""
    dtype: Literal["float32", "float16x2", "float16"] = "float32"
    """Of encoding on a GPU. float16x2 is several times as fast and agrees with float32 on all but some codes in ten
    thousand; float16 is faster still and less exact."""
    loudness_db: float | None = Field(None, le=0)
    """Scale each sound to this RMS level, in dB of full scale; null keeps it."""


class TokenizerSettings(Settings):
    text: TextTokenizerSettings = TextTokenizerSettings()
    image: ImageTokenizerSettings | None = None
    audio: AudioTokenizerSettings | None = None


class UnitSettings(Settings):
    """How the corpus is cut into units of work, each of which becomes one shard."""

    bytes: int = Field(256 * 2**20, ge=1)
    """Inputs are grouped up to this size; larger divisible ones (JSON lines) are split."""
    inputs: int = Field(1000, ge=1)
    """At most so many inputs in one unit."""
    tries: int = Field(3, ge=1)
    """How often a unit is tried whose worker died, before the job gives up."""


class ClusterSettings(Settings):
    """Where the workers run, and what each of them takes."""

    address: str | None = None
    """A running Ray cluster, such as `auto`. By default a job that was submitted to a cluster (`ray job submit`) uses
    that one, and any other starts a Ray of its own on this machine."""
    cpus_per_worker: float | None = Field(None, gt=0)
    """A worker with a GPU decodes in so many processes while it encodes: by default three quarters of its share of its node's
    CPUs, and at most 12; one, where no node has a GPU yet. Others decode and encode in turn, by default on one CPU."""
    gpus_per_worker: float = Field(0.0, ge=0)
    """Workers with a GPU, or a share of one, encode on it. Sources without media are then left to workers without, of one
    CPU each."""
    cpu_workers: int | None = Field(None, ge=0)
    """So many of these; as many as the workers with a GPU leave CPUs for by default. Without any, those with a GPU do all."""
    start_timeout_s: float = Field(600.0, gt=0)
    """How long to wait for the first worker, such as for an autoscaler to bring a node."""

    def cpus_of_workers(self, nodes: Iterable[tuple[float, float]]) -> float:
        """What each worker takes, of those with a GPU where there are such.

        Args:
            nodes: CPUs and GPUs of each; the one with the fewest CPUs for a GPU decides, of those with at least one for it.
        """
        if self.cpus_per_worker is not None:
            return self.cpus_per_worker
        gpu = self.gpus_per_worker
        shares = [cpus / (gpus / gpu) for cpus, gpus in nodes if gpu and gpus >= gpu]
        least = min((share for share in shares if share >= 1), default=1.0)
        return float(min(max(int(0.75 * least), 1), 12))

    def places(self, cpus: float, gpus: float, each: float) -> int:
        """Workers that fit a node of so many CPUs and GPUs, if each takes `each` CPUs; with a GPU where these have one."""
        # 1 / 0.1 is ten, and 1 // 0.1 nine.
        by_cpus = int(cpus / each + 1e-9)
        return min(by_cpus, int(gpus / self.gpus_per_worker + 1e-9)) if self.gpus_per_worker else by_cpus


class TokenizeRecipe(Settings):
    """Everything that decides what a tokenize job makes."""

    dataset: str = Field(min_length=1)
    """Folder or URI of the token dataset; it is made if it is not there."""
    sources: list[Source] = Field(min_length=1)
    tokenizers: TokenizerSettings = TokenizerSettings()
    sequence_length: int = Field(4096, ge=64)
    """The training sequence that every media span must fit, with the tokens that open and close its document."""
    validation_share: float = Field(0.01, ge=0, lt=1)
    """Share of the source identities that are held out from training."""
    duplicates: Literal["keep", "drop"] = "keep"
    """Of documents of equal content, from whatever source and run, training reads all, or only the one with the smallest
    row id. The dataset keeps all of them."""
    error_budget: float = Field(0.01, ge=0, le=1)
    """Share of the documents that may be quarantined before the job fails."""
    units: UnitSettings = UnitSettings()
    workers: int | None = Field(None, ge=1)
    """Worker processes at most, of those with a GPU where there are such; as many as the machine or the cluster has places
    for by default. More than that wait for nodes that an autoscaler may add."""
    cluster: ClusterSettings = ClusterSettings()
    threads: int = Field(1, ge=1)
    """Threads of each worker. Codes may differ in the last place between thread counts, so it is pinned."""

    def anchored(self) -> Self:
        """The recipe with local tokenizers named by absolute paths, to be read from any folder."""
        settings = self.tokenizers

        def absolute(name: str) -> str:
            return str(Path(name).absolute()) if Path(name).exists() else name

        text = settings.text.model_copy(update={"model": absolute(settings.text.model)})
        image, audio = (
            part and part.model_copy(update={"checkpoint": absolute(part.checkpoint)})
            for part in (settings.image, settings.audio)
        )
        named = settings.model_copy(update={"text": text, "image": image, "audio": audio})
        return self.model_copy(update={"tokenizers": named})

    @model_validator(mode="after")
    def _check(self) -> Self:
        names = [source.name for source in self.sources]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"sources: two are named {twice[0]}; rows are told apart by the source's name")
        image = self.tokenizers.image
        marks = DOCUMENT_MARKS + MEDIA_OPENING
        if image and image.rows * image.columns + marks > self.sequence_length:
            raise ValueError(
                f"tokenizers.image: {image.rows} x {image.columns} codes and {marks} special tokens do not fit "
                f"sequence_length {self.sequence_length}; raise it or lower rows and columns"
            )
        audio = self.tokenizers.audio
        for name, settings in (("image", image), ("audio", audio)):
            if settings and settings.dtype != "float32" and not self.cluster.gpus_per_worker:
                raise ValueError(
                    f"tokenizers.{name}.dtype: {settings.dtype} is for GPUs; set cluster.gpus_per_worker, or take float32"
                )
        if audio and audio.n_q and audio.max_frames * audio.n_q + marks > self.sequence_length:
            most = (self.sequence_length - marks) // audio.n_q
            raise ValueError(
                f"tokenizers.audio.max_frames: {audio.max_frames} frames of {audio.n_q} codes and {marks} special tokens "
                f"do not fit sequence_length {self.sequence_length}; set at most {most}"
            )
        return self

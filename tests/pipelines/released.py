"""Checkpoints as others release them: the packages' own classes, tiny and random, in the very layout of the files."""

from __future__ import annotations

import contextlib
import io
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor, nn

from pipelines.tokenizers.audio_config import AudioTokenizerConfig
from pipelines.tokenizers.encodec_network import EncodecNetwork

ENCODEC_SHAPE: dict[str, Any] = {"n_filters": 4, "dimension": 16, "ratios": [5, 4, 2], "lstm": 1}


def encodec_24khz() -> Any:
    """`encodec.EncodecModel` as its function for 24 kHz makes it: mono, causal, weight normalization. K 4, 64 entries."""
    model = _encodec_model(norm="weight_norm", causal=True, sample_rate_hz=24_000, channels=1)
    # Weights of a network that passes sound; of random ones the latents hardly move, and codes hang on the last bit.
    config = AudioTokenizerConfig(sample_rate_hz=24_000, n_q=1, **ENCODEC_SHAPE)
    network = EncodecNetwork(config)
    network.initialise()
    plain, state = network.state_dict(), model.state_dict()
    for name in state:
        weight = plain.get(name.replace("weight_v", "weight").replace("weight_g", "weight"))
        if name.endswith("weight_v"):
            state[name] = weight * (0.2 + torch.rand(len(weight), *[1] * (weight.ndim - 1)))
        elif name.endswith("weight_g"):
            state[name] = weight.flatten(1).norm(dim=1).view(state[name].shape)
        elif weight is not None and "quantizer" not in name:
            state[name] = weight
    model.load_state_dict(state)
    fill_codebooks(model, noise(24_000))
    return model


def encodec_48khz() -> Any:
    """`encodec.EncodecModel` as its function for 48 kHz makes it: stereo, norms over time, one loudness for each segment."""
    model = _encodec_model(norm="time_group_norm", causal=False, sample_rate_hz=48_000, channels=2)
    model.normalize, model.segment = True, 1.0
    fill_codebooks(model, 10 * noise(48_000))
    return model


def _encodec_model(*, norm: str, causal: bool, sample_rate_hz: int, channels: int) -> Any:
    torch.manual_seed(0)
    EncodecNetwork(AudioTokenizerConfig(sample_rate_hz=8000, n_q=1))  # Makes `import encodec` pass without torchaudio.
    stub = types.ModuleType("torchaudio")
    with _module("torchaudio", stub):
        from encodec.model import EncodecModel
    from encodec.modules import SEANetDecoder, SEANetEncoder
    from encodec.quantization import ResidualVectorQuantizer

    shape = {**ENCODEC_SHAPE, "norm": norm, "causal": causal, "channels": channels}
    quantizer = ResidualVectorQuantizer(dimension=16, n_q=4, bins=64)
    encoder, decoder = SEANetEncoder(**shape), SEANetDecoder(**shape)
    return EncodecModel(encoder, decoder, quantizer, [24.0], sample_rate_hz, channels).eval()


@torch.no_grad()
def fill_codebooks(model: Any, waveform: np.ndarray) -> None:
    """Entries drawn from what each codebook has to quantize; a model that was not trained has zeros, and one code for all.

    Args:
        model: EnCodec of either package.
    """
    channels = model.channels if hasattr(model, "channels") else model.config.audio_channels
    residual = model.encoder(torch.from_numpy(waveform)[None, None].expand(-1, channels, -1))
    for layer in model.quantizer.vq.layers if hasattr(model.quantizer, "vq") else model.quantizer.layers:
        codebook = layer._codebook if hasattr(layer, "_codebook") else layer.codebook
        vectors = residual[0].T
        chosen = torch.randperm(len(vectors))[: len(codebook.embed)]
        codebook.embed.copy_(vectors[chosen] + 0.05 * vectors.std() * torch.randn(len(chosen), vectors.shape[1]))
        codebook.inited.fill_(1.0)
        residual = residual - layer.decode(layer.encode(residual))


def noise(samples: int, seed: int = 0) -> np.ndarray:
    """float32 [samples] with an envelope."""
    rng = np.random.default_rng(seed)
    envelope = 0.1 + np.abs(np.sin(np.arange(samples) / 3000))
    return (rng.normal(0, 0.1, samples) * envelope).astype(np.float32)


TOWER = {"ch": 32, "ch_mult": [1, 1, 2, 2], "num_res_blocks": 1, "attn_resolutions": [8], "dropout": 0.0}


class OriginalVQGAN(nn.Module):
    """What `taming.models.vqgan.VQModel` and `GumbelVQ` are made of, for their module needs an old Lightning.

    Args:
        levels: 4 for f8, 5 for f16.
        remap: A file of the codes that stay.
    """

    def __init__(self, *, gumbel: bool = False, levels: int = 4, remap: Path | None = None) -> None:
        super().__init__()
        from taming.modules.diffusionmodules.model import Decoder, Encoder
        from taming.modules.vqvae.quantize import GumbelQuantize, VectorQuantizer2

        torch.manual_seed(1)
        ddconfig = {**TOWER, "ch_mult": [1, 1, 2, 2, 2][:levels], "double_z": False, "z_channels": 32, "resolution": 64}
        ddconfig |= {"in_channels": 3, "out_ch": 3}
        embed_dim = 32 if gumbel else 8
        self.params = {"embed_dim": embed_dim, "n_embed": 64, "ddconfig": ddconfig}
        table = None if remap is None else str(remap)
        with contextlib.redirect_stdout(io.StringIO()):
            self.encoder, self.decoder = Encoder(**ddconfig), Decoder(**ddconfig)
            self.quantize = (
                GumbelQuantize(32, embed_dim, n_embed=64, kl_weight=1e-8, temp_init=1.0, remap=table)
                if gumbel
                else VectorQuantizer2(64, embed_dim, beta=0.25, remap=table)
            )
        self.quant_conv, self.post_quant_conv = nn.Conv2d(32, embed_dim, 1), nn.Conv2d(embed_dim, 32, 1)
        if not gumbel:
            nn.init.normal_(self.quantize.embedding.weight, std=0.4)
        self.target = f"taming.models.vqgan.{'GumbelVQ' if gumbel else 'VQModel'}"
        self.eval().requires_grad_(False)

    def latents(self, images: Tensor) -> Tensor:
        return self.quant_conv(self.encoder(images))

    def codes(self, images: Tensor) -> Tensor:
        """int64 [B, R, C]."""
        latents = self.latents(images)
        return self.quantize(latents)[2][2].reshape(len(images), *latents.shape[2:])

    def images(self, codes: Tensor) -> Tensor:
        entries = self.quantize.get_codebook_entry(codes.flatten(), (*codes.shape, self.params["embed_dim"]))
        return self.decoder(self.post_quant_conv(entries))

    def release(self, folder: Path, **params: Any) -> Path:
        """Write `model.yaml` and `last.ckpt`, the latter as Lightning does: callbacks by class, numpy scalars, losses."""
        folder.mkdir(parents=True, exist_ok=True)
        loss = {
            "target": "taming.modules.losses.vqperceptual.VQLPIPSWithDiscriminator",
            "params": {"disc_start": 250001},
        }
        settings = {"base_learning_rate": 4.5e-06, "target": self.target}
        settings["params"] = {**self.params, "lossconfig": loss, **params}
        (folder / "model.yaml").write_text(yaml.safe_dump({"model": settings}))
        state = {**self.state_dict(), "loss.discriminator.main.0.weight": torch.randn(4, 3, 4, 4)}
        write_lightning(folder / "last.ckpt", state)
        return folder


def write_lightning(path: Path, state: dict[str, Tensor], **extra: Any) -> None:
    """A checkpoint with what Lightning 1.0 puts beside the weights."""
    name = "pytorch_lightning.callbacks.model_checkpoint"
    module = types.ModuleType(name)
    callback = type("ModelCheckpoint", (), {"__module__": name})
    module.ModelCheckpoint = callback  # type: ignore[attr-defined]
    kept = {"monitor": "val/rec_loss", "best_model_score": np.float64(0.31), "best_model_path": "epoch=000012.ckpt"}
    content = {
        "epoch": 12, "global_step": np.int64(47_000), "pytorch-lightning_version": "1.0.8", "state_dict": state,
        "callbacks": {callback: kept}, "optimizer_states": [{"state": {}, "param_groups": [{"lr": 4.5e-06}]}],
        "lr_schedulers": [], "hyper_parameters": {"embed_dim": 8}, **extra,
    }  # fmt: skip
    with contextlib.ExitStack() as modules:
        for part in ("pytorch_lightning", "pytorch_lightning.callbacks"):
            modules.enter_context(_module(part, types.ModuleType(part)))
        modules.enter_context(_module(name, module))
        torch.save(content, path)


@contextlib.contextmanager
def _module(name: str, module: types.ModuleType) -> Iterator[None]:
    if name in sys.modules:
        yield
        return
    sys.modules[name] = module
    try:
        yield
    finally:
        del sys.modules[name]

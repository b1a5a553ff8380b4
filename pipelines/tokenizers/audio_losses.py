"""What makes a reconstruction good: spectra near the original's, and a discriminator that cannot tell.

Enters: original and reconstructed waveforms, float32 [B, 1, samples]. Leaves: scalar losses. Everything is computed in
float32, also under autocast: spectra span more than bfloat16 holds.

Sources: mel term, Improved RVQGAN (Kumar et al., 2023), section 3.5; log and linear STFT terms, Parallel WaveGAN
(Yamamoto et al., 2020); STFT discriminator with hinge and feature matching, EnCodec (Défossez et al., 2022), section 3.4.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

# Shapes: B batch, S spectral bins, T frames, M mel bands.

MEL_BANDS = {64: 8, 128: 16, 256: 32, 512: 64, 1024: 80, 2048: 128}
"""Bands of the mel spectrum for each window length in samples; no band is narrower than a bin of its window."""
STFT_WINDOWS = (256, 1024)
FLOOR = 3e-4
"""About -70 dB of full scale: below it, differences do not count."""
DISCRIMINATOR_WINDOWS = (256, 512, 1024)


def mel_filters(sample_rate_hz: int, window: int, bands: int) -> Tensor:
    """Triangular filters on the mel scale (O'Shaughnessy, 1987), each of unit sum, float32 [M, S]."""
    limit = 2595.0 * torch.log10(torch.tensor(1.0 + sample_rate_hz / 2 / 700.0))
    edges = 700.0 * (10.0 ** (torch.linspace(0.0, float(limit), bands + 2) / 2595.0) - 1.0)
    bins = torch.linspace(0.0, sample_rate_hz / 2, window // 2 + 1)
    rising = (bins - edges[:-2, None]) / (edges[1:-1] - edges[:-2])[:, None]
    falling = (edges[2:, None] - bins) / (edges[2:] - edges[1:-1])[:, None]
    filters = torch.minimum(rising, falling).clamp_min(0.0)
    # A band between two bins takes the nearest one.
    nearest = F.one_hot((edges[1:-1, None] - bins).abs().argmin(dim=1), len(bins)).float()
    filters = torch.where(filters.sum(dim=1, keepdim=True) > 0, filters, nearest)
    return filters / filters.sum(dim=1, keepdim=True)


def magnitudes(waveforms: Tensor, window: Tensor) -> Tensor:
    """Magnitudes of white noise's own scale: noise of RMS r has magnitude r. [B, 1, samples] -> [B, S, T]."""
    spectrum = _stft(waveforms, window)
    return (spectrum.real.square() + spectrum.imag.square() + 1e-10).sqrt()


def _stft(waveforms: Tensor, window: Tensor) -> Tensor:
    length = len(window)
    spectrum = torch.stft(
        waveforms.float().squeeze(1),
        length,
        length // 4,
        window=window,
        center=True,
        pad_mode="reflect",
        return_complex=True,
    )
    return spectrum / window.square().sum().sqrt()


class ReconstructionLoss(nn.Module):
    """Multi-scale mel, log and linear STFT, and waveform terms, already weighted.

    Args:
        sample_rate_hz: Of the waveforms.
        mel, log_stft, linear_stft, waveform: Weights. The mel term dominates; the waveform term is small, for at these bit
            rates phase is mostly not in the codes.
    """

    def __init__(
        self,
        sample_rate_hz: int,
        *,
        mel: float = 15.0,
        log_stft: float = 1.0,
        linear_stft: float = 1.0,
        waveform: float = 0.3,
    ) -> None:
        super().__init__()
        self.weights = {"mel": mel, "log_stft": log_stft, "linear_stft": linear_stft, "waveform": waveform}
        for window, bands in MEL_BANDS.items():
            self.register_buffer(f"window_{window}", torch.hann_window(window))
            self.register_buffer(f"mel_{window}", mel_filters(sample_rate_hz, window, bands))

    def forward(self, original: Tensor, decoded: Tensor) -> dict[str, Tensor]:
        """Weighted scalar terms by name; their sum is the loss. Both inputs float32 [B, 1, samples]."""
        with torch.autocast(original.device.type, enabled=False):
            decoded = decoded.float()
            terms = {name: original.new_zeros(()) for name in self.weights}
            for window in MEL_BANDS:
                taper, filters = getattr(self, f"window_{window}"), getattr(self, f"mel_{window}")
                wanted, found = magnitudes(original, taper), magnitudes(decoded, taper)
                difference = _log(filters @ wanted) - _log(filters @ found)
                terms["mel"] = terms["mel"] + difference.abs().mean() / len(MEL_BANDS)
                if window in STFT_WINDOWS:
                    log_difference = (_log(wanted) - _log(found)).abs().mean()
                    terms["log_stft"] = terms["log_stft"] + log_difference / len(STFT_WINDOWS)
                    error = (wanted - found).square().sum(dim=(1, 2)).sqrt()
                    relative = error / wanted.square().sum(dim=(1, 2)).sqrt().clamp_min(1.0)
                    terms["linear_stft"] = terms["linear_stft"] + relative.mean() / len(STFT_WINDOWS)
            error = (original - decoded).abs().mean(dim=(1, 2))
            terms["waveform"] = (error / original.abs().mean(dim=(1, 2)).clamp_min(1e-3)).mean()
            return {name: self.weights[name] * term for name, term in terms.items()}


def _log(magnitude: Tensor) -> Tensor:
    return torch.log10(magnitude + FLOOR)


class SpectralDiscriminator(nn.Module):
    """Small convolutional networks over complex spectra at several resolutions.

    Magnitudes are compressed by a power of 0.4, so that quiet detail, where codecs sound metallic, is seen too.
    """

    def __init__(self, channels: int = 32) -> None:
        super().__init__()
        self.scales = nn.ModuleList(_Scale(window, channels) for window in DISCRIMINATOR_WINDOWS)

    def forward(self, waveforms: Tensor) -> list[list[Tensor]]:
        """Feature maps of each scale, the last being the verdict (high for real), from float32 [B, 1, samples]."""
        return [scale(waveforms) for scale in self.scales]


class _Scale(nn.Module):
    def __init__(self, window: int, channels: int) -> None:
        super().__init__()
        self.register_buffer("window", torch.hann_window(window))
        # Kernels and strides are (bins, frames).
        shapes = [(2, channels, (7, 3), 1, 1)] + [(channels, channels, (7, 3), 2, dilation) for dilation in (1, 2, 4)]
        self.layers = nn.ModuleList(
            weight_norm(
                nn.Conv2d(inputs, outputs, kernel, stride=(stride, 1), dilation=(1, dilation), padding=(3, dilation))
            )
            for inputs, outputs, kernel, stride, dilation in shapes
        )
        self.verdict = weight_norm(nn.Conv2d(channels, 1, 3, padding=1))

    def forward(self, waveforms: Tensor) -> list[Tensor]:
        with torch.autocast(waveforms.device.type, enabled=False):
            spectrum = _stft(waveforms, self.window)  # type: ignore[arg-type]
            parts = torch.stack([spectrum.real, spectrum.imag], dim=1)
            x = parts * (parts.square().sum(dim=1, keepdim=True) + 1e-6).pow(-0.3)
        x = x.contiguous(memory_format=torch.channels_last)
        features = []
        for layer in self.layers:
            x = F.leaky_relu(layer(x), 0.2)
            features.append(x)
        return [*features, self.verdict(x)]


def discriminator_loss(real: list[list[Tensor]], decoded: list[list[Tensor]]) -> Tensor:
    """Hinge loss of the discriminator; `decoded` from detached waveforms."""
    losses = [
        F.relu(1 - r[-1].float()).mean() + F.relu(1 + d[-1].float()).mean() for r, d in zip(real, decoded, strict=True)
    ]
    return torch.stack(losses).mean()


def adversarial_losses(real: list[list[Tensor]], decoded: list[list[Tensor]]) -> tuple[Tensor, Tensor]:
    """For the codec: how far the verdict is from real, and how far features are from the original's (relative L1)."""
    fooling = torch.stack([-d[-1].float().mean() for d in decoded]).mean()
    distances = [
        (d.float() - r.float().detach()).abs().mean() / r.float().detach().abs().mean().clamp_min(1e-3)
        for real_maps, decoded_maps in zip(real, decoded, strict=True)
        for r, d in zip(real_maps[:-1], decoded_maps[:-1], strict=True)
    ]
    return fooling, torch.stack(distances).mean()

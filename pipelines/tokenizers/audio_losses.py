"""How far a reconstruction is from its original, as spectra at several resolutions.

Enters: original and reconstructed waveforms, float32 [B, 1, samples]. Leaves: scalar losses of order one. Everything is
computed in float32, also under autocast: spectra span more than bfloat16 holds.

Three terms. Log-mel distance and the distance of compressed magnitudes, both over all resolutions, are what timbre is made
of; the relative error of the waveform alone knows phase, so that low harmonics are followed and not only imitated. It goes
first: a network that begins with magnitudes learns to shape noise, and no longer finds phase. Compression (the square root of
the magnitude) and the floor of the logarithm keep silence from outweighing speech: the gradient of an uncompressed logarithm
grows without limit where there is nothing to hear.

Source: mel term, Improved RVQGAN (Kumar et al., 2023), section 3.5.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Shapes: B batch, S spectral bins, T frames, M mel bands.

MEL_BANDS = {256: 24, 512: 48, 1024: 80, 2048: 120}
"""Bands of the mel spectrum for each window length in samples."""
FLOOR = 3e-3
"""50 dB below full scale: differences below it do not count."""
COMPRESSION_FLOOR = 1e-2
SPEECH_BAND_HZ = (100.0, 5000.0)
OUTSIDE_SPEECH = 0.3
"""Weight of bins outside the speech band."""


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


def fourier_basis(window: int) -> Tensor:
    """A Hann-windowed discrete Fourier transform as a matrix, float32 [window, 2 * S]: real parts, then imaginary parts.

    Scaled so that white noise of RMS r has magnitude r in every bin.
    """
    taper = torch.hann_window(window, dtype=torch.float64)
    turns = torch.outer(torch.arange(window), torch.arange(window // 2 + 1)) % window
    angles = turns.double() * (2.0 * math.pi / window)
    waves = torch.cat([angles.cos(), -angles.sin()], dim=1) * taper[:, None]
    return (waves / taper.square().sum().sqrt()).float()


def spectra(waveforms: Tensor, basis: Tensor) -> Tensor:
    """Short-time spectra with a hop of a quarter of the window: [B, 1, samples] -> [B, T, 2, S], real and imaginary.

    A matrix product, not an FFT: two launches instead of six on a device, and the matrices are small.
    """
    window = len(basis)
    padded = F.pad(waveforms.float(), (window // 2, window // 2), mode="reflect").squeeze(1)
    return (padded.unfold(1, window, window // 4) @ basis).unflatten(-1, (2, -1))


def magnitudes(spectrum: Tensor) -> Tensor:
    """[B, T, 2, S] -> [B, T, S]."""
    return (spectrum.square().sum(dim=2) + 1e-10).sqrt()


class ReconstructionLoss(nn.Module):
    """Waveform, multi-resolution mel, and multi-resolution magnitude terms, already weighted.

    Args:
        sample_rate_hz: Of the waveforms.
        waveform, mel, magnitude: Weights. Silence in place of speech costs 1 of `waveform` and 1 of `magnitude`.
    """

    def __init__(self, sample_rate_hz: int, *, waveform: float = 2.0, mel: float = 1.0, magnitude: float = 1.0) -> None:
        super().__init__()
        self.waveform, self.mel, self.magnitude = waveform, mel, magnitude
        self.register_buffer("spectral_share", torch.ones(()))
        low, high = SPEECH_BAND_HZ
        for window, bands in MEL_BANDS.items():
            hertz = torch.linspace(0.0, sample_rate_hz / 2, window // 2 + 1)
            self.register_buffer(f"basis_{window}", fourier_basis(window))
            self.register_buffer(f"mel_{window}", mel_filters(sample_rate_hz, window, bands).T.contiguous())
            self.register_buffer(f"weight_{window}", torch.where((hertz >= low) & (hertz <= high), 1.0, OUTSIDE_SPEECH))

    def set_spectral_share(self, share: float) -> None:
        """Scale both spectral terms, on the device: a captured step sees it."""
        self.get_buffer("spectral_share").fill_(share)

    def forward(self, original: Tensor, decoded: Tensor) -> dict[str, Tensor]:
        """Weighted scalar terms by name; their sum is the loss. Both inputs float32 [B, 1, samples]."""
        with torch.autocast(original.device.type, enabled=False):
            error = (original - decoded).square().mean() / original.square().mean().clamp_min(1e-5)
            mel, magnitude = original.new_zeros(()), original.new_zeros(())
            for window in MEL_BANDS:
                basis, filters, weight = (self.get_buffer(f"{name}_{window}") for name in ("basis", "mel", "weight"))
                wanted = magnitudes(spectra(original, basis))
                found = magnitudes(spectra(decoded, basis))
                mel = mel + (torch.log(wanted @ filters + FLOOR) - torch.log(found @ filters + FLOOR)).abs().mean()
                wanted, found = _compressed(wanted) * weight, _compressed(found) * weight
                magnitude = magnitude + (wanted - found).abs().mean() / wanted.mean().clamp_min(1e-3)
            share = self.get_buffer("spectral_share") / len(MEL_BANDS)
            return {
                "waveform": self.waveform * error,
                "mel": self.mel * share * mel,
                "magnitude": self.magnitude * share * magnitude,
            }


def _compressed(magnitude: Tensor) -> Tensor:
    return magnitude * (magnitude + COMPRESSION_FLOOR).rsqrt()

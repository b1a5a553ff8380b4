"""Model FLOPs utilisation: which share of what the devices could compute goes into the model.

Enters: the FLOPs of a token as the plan counts them, and the peak of a device. Leaves: shares by convention of attention,
"full" and "causal". Always holds: a peak that is not known is not guessed, and then there is no share; padding and what is
computed twice count for nothing.

Source: Chowdhery et al., PaLM (2022), section 4.1 and appendix B.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

_PEAKS = {
    "B200": 2250.0,
    "GH200": 989.4,
    "H200 NVL": 835.5,
    "H200": 989.4,
    "H100 PCIe": 756.5,
    "H100 NVL": 835.5,
    "H100": 989.4,
    "A100": 312.0,
    "L40S": 362.0,
    "L4": 121.0,
    "MI300X": 1307.4,
}
"""Dense bfloat16 TFLOP/s by the makers' datasheets, by a word of the device's name; the first that is there counts."""


def peak_tflops(name: str) -> float | None:
    """What a GPU of this name could do in bfloat16; None if it is not known.

    Args:
        name: as `torch.cuda.get_device_name` says it.
    """
    words = f" {name.replace('-', ' ')} "
    return next((peak for known, peak in _PEAKS.items() if f" {known} " in words), None)


def peak_of(device: torch.device, precision: str) -> float | None:
    """TFLOP/s of a device of the run; None on a CPU, on a GPU that is not known, and in fp32, whose peak is another one.

    Args:
        precision: of the recipe; float8, in which only part of a step is computed, is held against bfloat16.
    """
    if device.type != "cuda" or precision == "fp32":
        return None
    return peak_tflops(torch.cuda.get_device_name(device))


def utilisation(flops_per_token: Mapping[str, float], tokens_per_s: float, peak: float) -> dict[str, float]:
    """Shares by convention.

    Args:
        tokens_per_s: of all ranks, without padding.
        peak: TFLOP/s of all devices together.
    """
    return {name: flops * tokens_per_s / (peak * 1e12) for name, flops in flops_per_token.items()}

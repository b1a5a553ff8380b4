"""The encoder of a VQGAN on a GPU, in half precision, several times as fast as its modules.

What enters: uint8 [N, H, W, 3] on the GPU. What leaves: int32 codes [N, R, C]. What always holds: the network is the
one of `VQGAN.encoder` with `quant_conv` and the quantizer, its weights rounded to the dtype; statistics of
normalizations, sums, latents and the scores of codes are float32. `pipelines.tokenizers.vqgan_kernels` has the kernels;
here is the order in which they run.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipelines.tokenizers.vqgan_kernels import (
    Activation,
    Codebook,
    conv,
    finish,
    fits_conv,
    nearest,
    normalize,
    stem,
    stem_weight,
)


class _Norm:
    """A group normalization."""

    def __init__(self, norm: nn.GroupNorm, dtype: torch.dtype) -> None:
        self.weight, self.bias = norm.weight.detach().clone(), norm.bias.detach().clone()
        self.groups, self.eps = norm.num_groups, norm.eps
        self.dtype = dtype

    def __call__(self, x: Activation, *, silu: bool = True) -> Tensor:
        return normalize(x, self.weight, self.bias, self.groups, silu=silu, dtype=self.dtype, eps=self.eps)


class _Conv:
    """A convolution of side 1 or 3: by our kernel where pictures are wide, which is most of the work, else by cuDNN."""

    def __init__(self, weight: Tensor, bias: Tensor, dtype: torch.dtype, stride: int = 1) -> None:
        self.weight = weight.detach().permute(0, 2, 3, 1).to(dtype, copy=True).contiguous()
        self.bias = bias.detach().clone()
        self.stride = stride

    @classmethod
    def of(cls, module: nn.Conv2d, dtype: torch.dtype) -> "_Conv":
        return cls(module.weight, module.bias, dtype, module.stride[0])  # type: ignore[arg-type]

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Activation:
        x = x.to(self.weight.dtype)
        if self.weight.shape[1] == 3 and fits_conv(x.shape[2] // self.stride, x.shape[3]):
            if residual is not None:
                residual = residual.to(x.dtype)
            return conv(x, self.weight, self.bias, stride=self.stride, residual=residual)
        return finish(self.products(x), self.bias, residual)

    def products(self, x: Tensor) -> Tensor:
        """The convolution without its bias: [N, H, W, C] to the same, of the weights' dtype."""
        x = x.to(self.weight.dtype)
        side = self.weight.shape[1]
        if side == 1:
            return F.linear(x, self.weight[:, 0, 0])
        if self.stride == 2:  # Zeros below and on the right only.
            x = F.pad(x, (0, 0, 0, 1, 0, 1))
        padding = 1 if self.stride == 1 else 0
        y = F.conv2d(x.permute(0, 3, 1, 2), self.weight.permute(0, 3, 1, 2), None, self.stride, padding)
        return y.permute(0, 2, 3, 1).contiguous()


class _Residual:
    """Two convolutions, each after a normalization, beside a shortcut."""

    def __init__(self, block: Any, dtype: torch.dtype) -> None:
        self.norms = _Norm(block.norm1, dtype), _Norm(block.norm2, dtype)
        self.convs = _Conv.of(block.conv1, dtype), _Conv.of(block.conv2, dtype)
        shortcut = getattr(block, "nin_shortcut", None)
        self.shortcut = shortcut and _Conv.of(shortcut, dtype)
        if self.shortcut:  # Its bias is added once, with that of the second convolution.
            self.convs[1].bias += self.shortcut.bias

    def __call__(self, x: Activation) -> Activation:
        inner = self.convs[0](self.norms[0](x))
        around = self.shortcut.products(x.values) if self.shortcut else x.values
        return self.convs[1](self.norms[1](inner), around)


class _Attention:
    """Every place of a picture looks at every other, with one head."""

    def __init__(self, block: Any, dtype: torch.dtype) -> None:
        self.norm = _Norm(block.norm, dtype)
        parts = [getattr(block, name) for name in "qkv"]
        # The scale in the queries' weights keeps the products small, far from what half precision can hold.
        scale = parts[0].weight.shape[0] ** -0.5
        weight, bias = (torch.cat([getattr(part, name) for part in parts]) for name in ("weight", "bias"))
        channels = parts[0].weight.shape[0]
        scales = torch.cat([weight.new_full((channels,), scale), weight.new_ones(2 * channels)])
        self.weight = (weight.flatten(1) * scales[:, None]).to(dtype)
        self.bias = (bias * scales).to(dtype)
        self.outward = _Conv.of(block.proj_out, dtype)

    def __call__(self, x: Activation) -> Activation:
        q, k, v = F.linear(self.norm(x, silu=False).flatten(1, 2), self.weight, self.bias).chunk(3, -1)
        seen = torch.bmm(F.softmax(torch.bmm(q, k.transpose(1, 2)), -1), v)
        return self.outward(seen.view(x.values.shape), x.values)


class _Downsample:
    """A convolution of stride 2."""

    def __init__(self, module: nn.Conv2d, dtype: torch.dtype) -> None:
        self.conv = _Conv.of(module, dtype)

    def __call__(self, x: Activation) -> Activation:
        return self.conv(x.values)


class FusedEncoder:
    """Pixels to codes."""

    def __init__(self, encoder: Any, quant_conv: nn.Conv2d, codebook: Codebook, dtype: torch.dtype) -> None:
        """Lay out the weights of `encoder`, the package's, and `quant_conv`; they are float32 and on the GPU."""
        first, middle, last = encoder.conv_in, encoder.mid, encoder.conv_out
        self.stem = stem_weight(first.weight.detach(), dtype), first.bias.detach().clone()
        self.layers: list[Callable[[Activation], Activation]] = []
        for level in encoder.down:
            for index, block in enumerate(level.block):
                self.layers.append(_Residual(block, dtype))
                self.layers += [_Attention(attention, dtype) for attention in level.attn[index : index + 1]]
            if hasattr(level, "downsample"):
                self.layers.append(_Downsample(level.downsample.conv, dtype))
        self.layers += [_Residual(middle.block_1, dtype), _Attention(middle.attn_1, dtype)]
        self.layers.append(_Residual(middle.block_2, dtype))
        self.norm = _Norm(encoder.norm_out, dtype)
        # Nothing is between the last convolution and `quant_conv`: one convolution does the work of both.
        outer = quant_conv.weight.double().flatten(1)
        weight = torch.einsum("om,mikl->oikl", outer, last.weight.double()).float()
        bias = (outer @ last.bias.double() + quant_conv.bias.double()).float()  # type: ignore[union-attr]
        self.last = _Conv(weight, bias, dtype)
        self.codebook = codebook

    def latents(self, pixels: Tensor) -> Tensor:
        """uint8 [N, H, W, 3] to float32 [N, R, C, E]."""
        # Or cuDNN might choose algorithms by timing, and codes would differ from run to run.
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True):
            x = stem(pixels, *self.stem)
            for layer in self.layers:
                x = layer(x)
            return self.last.products(self.norm(x)).float() + self.last.bias

    def __call__(self, pixels: Tensor) -> Tensor:
        """uint8 [N, H, W, 3] to int32 [N, R, C]; -1 where the dtype could not hold what the network computes."""
        latents = self.latents(pixels)
        vectors = latents.flatten(0, 2)
        codes = nearest(vectors, self.codebook)
        return torch.where(vectors.isfinite().all(1), codes, -1).view(latents.shape[:3])

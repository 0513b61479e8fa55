"""Symmetric int8 quantization with one float32 scale per sense.

The scale is the row's absolute maximum over 127, rounded up to 17 significant bits: value times scale is then exact in
float32, and quantizing a dequantized row again returns the same values and scale.
"""

import torch
from torch import Tensor

_LARGEST = 127
_SMALLEST_SCALE = 2.0**-126  # the smallest normal float32; also the scale of an all-zero row
_DROPPED_BITS = 0x7F  # the last seven bits of a float32 mantissa


def quantize(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return int8 values [M, D] and float32 scales [M] of floating-point rows [M, D] that are finite in float32.

    The absolute error of each number is at most half a scale.
    """
    rows = rows.float()
    largest = rows.abs().amax(1) if rows.numel() else rows.new_zeros(len(rows))
    scales = (largest / _LARGEST).clamp(min=_SMALLEST_SCALE)
    scales = ((scales.view(torch.int32) + _DROPPED_BITS) & ~_DROPPED_BITS).view(torch.float32)
    return (rows / scales[:, None]).round().clamp(-_LARGEST, _LARGEST).to(torch.int8), scales


def dequantize(values: Tensor, scales: Tensor) -> Tensor:
    """Return float32 rows [M, D] of int8 values [M, D] and float32 scales [M]."""
    return values.float().mul_(scales[:, None])

"""Senses in one byte a number: int8 values, and a float32 scale a sense.

Comes in: floating-point rows [M, D]. Goes out: values and scales, or rows again. Holds what comes in a second time. A scale
is the largest number of its row over 127, rounded up to 17 binary digits: values times scale are then exact in float32,
and rows that were made of int8 once become the same values and scales again.
"""

import torch
from torch import Tensor

_LARGEST = 127
_SMALLEST_SCALE = 2.0**-126  # float32's smallest of full precision; of rows of zeros too
_SHORT = 0x7F  # the last seven of float32's digits


def quantise(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return the values int8 [M, D] and scales float32 [M] of rows; each number is off by half a scale at most.

    Args:
        rows: floating point [M, D], finite in float32.
    """
    rows = rows.float()
    largest = rows.abs().amax(1) if rows.numel() else rows.new_zeros(len(rows))
    scales = (largest / _LARGEST).clamp(min=_SMALLEST_SCALE)
    scales = ((scales.view(torch.int32) + _SHORT) & ~_SHORT).view(torch.float32)
    return (rows / scales[:, None]).round().clamp(-_LARGEST, _LARGEST).to(torch.int8), scales


def dequantise(values: Tensor, scales: Tensor) -> Tensor:
    """Return the rows float32 [M, D] of values int8 [M, D] and scales float32 [M]."""
    return values.float().mul_(scales[:, None])

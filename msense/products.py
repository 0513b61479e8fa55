"""Products of float32 matrices by the fastest library at hand.

In: two matrices. Out: their product. On a CPU with AVX-512 torch leaves such products to MKL, which on an AMD processor
uses half of what there is; oneDNN, which torch has beside it, uses all of it (up to 2.3 times as fast).
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch


@cache
def _linear() -> Callable[..., torch.Tensor] | None:
    """Return oneDNN's product if torch has it and it does what is expected: not a public function of torch."""
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or not torch.backends.mkldnn.is_available():
        return None
    left, right = torch.eye(2, 3), torch.arange(12.0).view(3, 4)
    try:
        linear: Any = torch.ops.mkldnn._linear_pointwise
        right_answer = torch.equal(linear(left, right.T, None, "none", [], ""), left @ right)
    except (AttributeError, RuntimeError, TypeError):
        return None
    return linear if right_answer else None


def product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Multiply matrices [m, k] and [k, n], of one dtype and device; a fresh tensor [m, n].

    oneDNN prepares for every new shape (some milliseconds, once in a process): not for shapes that come once.
    """
    if left.dtype == torch.float32 and left.device.type == "cpu" and (linear := _linear()):
        return linear(left, right.T, None, "none", [], "")
    return torch.mm(left, right)

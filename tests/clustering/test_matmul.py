"""Matrix products equal those of float64, whichever library computes them."""

import pytest
import torch

from msense.clustering import matmul


@pytest.mark.parametrize("fast", [True, False])
def test_products_equal_those_of_float64(fast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not fast:
        monkeypatch.setattr(matmul, "_linear", lambda: None)
    generator = torch.Generator().manual_seed(0)
    for m, k, n in ((1, 1, 1), (4, 384, 1024), (20, 7, 1000), (130, 130, 130)):
        left, right = torch.randn(m, k, generator=generator), torch.randn(n, k, generator=generator)
        for a, b in ((left, right.T), (left, right.T.contiguous()), (left.T.contiguous().T, right.T)):
            product = matmul.product(a, b)
            assert product.shape == (m, n)
            torch.testing.assert_close(product.double(), a.double() @ b.double(), rtol=1e-5, atol=1e-5 * k**0.5)
    wide = torch.randn(3, 5, dtype=torch.float64, generator=generator)
    assert matmul.product(wide, wide.T).dtype == torch.float64

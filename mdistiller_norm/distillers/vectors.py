"""Vectors of length 1, safe for any input."""

from __future__ import annotations

import torch
from torch import Tensor

from mdistiller_norm.distillers.base import at_least_float32


def unit(x: Tensor, dim: int) -> Tensor:
    """Divide by the Euclidean length along ``dim``; a vector of zeros stays zero, and no gradient flows to it.

    Neither huge nor tiny values overflow or vanish in the squares. In at least float32.
    """
    x = at_least_float32(x)
    peak = x.detach().abs().amax(dim, keepdim=True)
    zero = peak == 0
    x = x / peak.masked_fill(zero, 1)
    length: Tensor = torch.linalg.vector_norm(x, dim=dim, keepdim=True)
    return x / length.masked_fill(zero, torch.inf)

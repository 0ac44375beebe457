"""Matrix products in half precision whose results keep float32, and what precision a gradient is kept in."""

from __future__ import annotations

import torch
from torch import Tensor


def product(a: Tensor, b: Tensor, out: Tensor) -> None:
    """out = a @ b, added up in float32 and, where ``out`` is float32, not rounded after."""
    if out.dtype == a.dtype:
        torch.mm(a, b, out=out)
    elif out.device.type == "cuda":
        torch.mm(a, b, out_dtype=out.dtype, out=out)
    else:
        torch.mm(a.to(out.dtype), b.to(out.dtype), out=out)


def add_product(a: Tensor, b: Tensor, out: Tensor) -> None:
    """out += a @ b within the product, in float32."""
    if out.dtype == a.dtype:
        out.addmm_(a, b)
    elif out.device.type == "cuda":
        # As a batch of one, because torch 2.8's addmm wants out in the precision of a; cuBLAS runs the same product.
        batch = out.unsqueeze(0)
        torch.baddbmm(batch, a.unsqueeze(0), b.unsqueeze(0), out_dtype=out.dtype, out=batch)
    else:
        out.addmm_(a.to(out.dtype), b.to(out.dtype))


def gradient_dtype(x: Tensor) -> torch.dtype:
    """What a gradient of ``x`` is kept in until it is handed out.

    float16 underflows where bfloat16 does not: its gradients stay in float32 until the backward has brought the scale
    of the loss.
    """
    return torch.float32 if x.dtype == torch.float16 else x.dtype

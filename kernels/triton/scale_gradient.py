"""Multiply a gradient by the upstream gradient of the loss, in place; by 1, which is the rule, nothing is touched."""

import torch
import triton
import triton.language as tl


@triton.jit(do_not_specialize=["T"])
def _scale_gradient_kernel(
    gradient,  # (B, T, V), any strides
    factor,  # scalar
    T,
    V,
    stride_b,
    stride_t,
    stride_v,
    BLOCK: tl.constexpr,
):
    value = tl.load(factor).to(tl.float32)
    if value != 1.0:
        n = tl.program_id(0).to(tl.int64)
        row = gradient + (n // T) * stride_b + (n % T) * stride_t
        for start in range(0, V, BLOCK):
            cols = start + tl.arange(0, BLOCK)
            x = tl.load(row + cols.to(tl.int64) * stride_v, mask=cols < V)
            scaled = (x.to(tl.float32) * value).to(x.dtype)
            tl.store(row + cols.to(tl.int64) * stride_v, scaled, mask=cols < V)


def scale_gradient(gradient: torch.Tensor, factor: torch.Tensor) -> None:
    """Multiply ``gradient`` (B, T, V) in place by the scalar tensor ``factor``."""
    B, T, V = gradient.shape
    if B * T > 0:
        _scale_gradient_kernel[(B * T,)](gradient, factor, T, V, *gradient.stride(), BLOCK=8192, num_warps=8)

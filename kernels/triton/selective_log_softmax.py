"""Log-probabilities of chosen tokens and entropy over logits: one read forward, one read and one write backward.

Data flow, a program a row: logits -> row_statistics -> logp, entropy, and (shift, total), from which the backward
rebuilds every probability without summing again -> row_gradient -> gradient of the logits.
"""

import torch
import triton
import triton.language as tl

from grpo_fast.kernels._rows import row_gradient, row_statistics, row_zero

# Threads of a program, and the 16-byte loads that each makes at a time. A few rows need many threads each to keep the
# memory busy; many rows do that by themselves, and then the sooner a program's threads are done the better.
FEW_ROWS = 512
FWD_SHAPE = {"LANES": 256, "UNROLL": 1, "num_warps": 8}
FWD_SHAPE_OF_FEW = {"LANES": 1024, "UNROLL": 2, "num_warps": 32}
BWD_SHAPE = {"LANES": 256, "UNROLL": 2, "num_warps": 8}
BWD_SHAPE_OF_FEW = {"LANES": 1024, "UNROLL": 2, "num_warps": 32}


def logits_arguments(temperature: float, logit_scale: float, softcap: float | None) -> dict[str, float]:
    """What the kernels take for z = softcap * tanh(logit_scale * x / softcap) / temperature; see ``_rows``."""
    if softcap is None:
        return {"slope": logit_scale / temperature, "cap": 1.0, "cap_in": 1.0}
    return {"slope": 1.0 / temperature, "cap": softcap, "cap_in": logit_scale / softcap}


# T and the number of rows change with every batch: compiled for none of their values.
@triton.jit(do_not_specialize=["T"])
def _selective_log_softmax_fwd_kernel(
    # inputs
    logits,  # (B, T, V), any strides
    index,  # (B T,)
    mask,  # (B T,), or None
    # outputs, all (B T,) float32
    logps,
    entropies,
    shifts,
    totals,
    # sizes and strides
    T,
    V,
    stride_b,
    stride_t,
    stride_v,
    # options
    slope,
    cap,
    cap_in,
    HAS_SOFTCAP: tl.constexpr,
    ENTROPY: tl.constexpr,
    LANES: tl.constexpr,
    UNROLL: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64)
    kept = n >= 0
    if mask is not None:
        kept = tl.load(mask + n) != 0
    if kept:
        row = logits + (n // T) * stride_b + (n % T) * stride_t
        target = tl.load(index + n)
        inside = (target >= 0) & (target < V)
        logp, entropy, shift, total = row_statistics(
            row,
            stride_v,
            V,
            tl.where(inside, target, 0).to(tl.int32),
            slope,
            cap,
            cap_in,
            HAS_SOFTCAP,
            ENTROPY,
            LANES,
            UNROLL,
        )
        tl.store(logps + n, tl.where(inside, logp, float("nan")))
        tl.store(shifts + n, shift)
        tl.store(totals + n, total)
        if ENTROPY:
            tl.store(entropies + n, entropy)
    else:
        tl.store(logps + n, 0.0)
        if ENTROPY:
            tl.store(entropies + n, 0.0)


@triton.jit(do_not_specialize=["T"])
def _selective_log_softmax_bwd_kernel(
    # inputs
    logits,  # (B, T, V), any strides
    index,  # (B T,)
    mask,  # (B T,), or None
    logps,  # and the other results of the forward
    entropies,
    shifts,
    totals,
    d_logps,  # (B T,) float32, upstream gradients
    d_entropies,
    # output
    out,  # (B, T, V), any strides; may be the logits
    # sizes and strides
    T,
    V,
    stride_b,
    stride_t,
    stride_v,
    out_stride_b,
    out_stride_t,
    out_stride_v,
    # options
    slope,
    cap,
    cap_in,
    HAS_SOFTCAP: tl.constexpr,
    ENTROPY: tl.constexpr,
    LANES: tl.constexpr,
    UNROLL: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64)
    row = logits + (n // T) * stride_b + (n % T) * stride_t
    out_row = out + (n // T) * out_stride_b + (n % T) * out_stride_t
    target = tl.load(index + n)
    inside = (target >= 0) & (target < V)
    d_logp = tl.where(inside, tl.load(d_logps + n), 0.0)
    d_entropy = tl.load(d_entropies + n) if ENTROPY else 0.0
    kept = n >= 0
    if mask is not None:
        kept = tl.load(mask + n) != 0
    if kept & ((d_logp != 0.0) | (d_entropy != 0.0)):
        entropy = tl.load(entropies + n) if ENTROPY else 0.0
        row_gradient(
            row,
            stride_v,
            out_row,
            out_stride_v,
            V,
            tl.where(inside, target, -1).to(tl.int32),
            tl.load(logps + n),
            entropy,
            tl.load(shifts + n),
            tl.load(totals + n),
            d_logp,
            d_entropy,
            slope,
            cap,
            cap_in,
            HAS_SOFTCAP,
            ENTROPY,
            LANES,
            UNROLL,
        )
    else:
        row_zero(out_row, out_stride_v, V, LANES, UNROLL)


def selective_log_softmax_fwd(
    logits: torch.Tensor,
    index: torch.Tensor,
    mask: torch.Tensor | None,
    temperature: float,
    logit_scale: float,
    softcap: float | None,
    return_entropy: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(logps, entropy, shift, total), each (B, T) float32, of ``logits`` (B, T, V); see ``_rows`` for the last two.

    ``index`` and ``mask`` (bool) are (B, T) and contiguous. Without ``return_entropy`` the entropy is empty.
    """
    B, T, V = logits.shape
    logps, shifts, totals = (torch.empty(B, T, device=logits.device, dtype=torch.float32) for _ in range(3))
    entropies = torch.empty_like(logps) if return_entropy else logps.new_empty(0)
    if B * T > 0:
        _selective_log_softmax_fwd_kernel[(B * T,)](
            logits,
            index,
            mask,
            logps,
            entropies,
            shifts,
            totals,
            T,
            V,
            *logits.stride(),
            **logits_arguments(temperature, logit_scale, softcap),
            HAS_SOFTCAP=softcap is not None,
            ENTROPY=return_entropy,
            **(FWD_SHAPE_OF_FEW if B * T <= FEW_ROWS else FWD_SHAPE),
        )
    return logps, entropies, shifts, totals


def selective_log_softmax_bwd(
    out: torch.Tensor,
    logits: torch.Tensor,
    index: torch.Tensor,
    mask: torch.Tensor | None,
    logps: torch.Tensor,
    entropies: torch.Tensor,
    shifts: torch.Tensor,
    totals: torch.Tensor,
    d_logps: torch.Tensor,
    d_entropies: torch.Tensor | None,
    temperature: float,
    logit_scale: float,
    softcap: float | None,
) -> None:
    """Write the gradient of the logits to ``out`` (B, T, V), which may be ``logits``; the upstream is contiguous."""
    B, T, V = logits.shape
    if B * T > 0:
        _selective_log_softmax_bwd_kernel[(B * T,)](
            logits,
            index,
            mask,
            logps,
            entropies,
            shifts,
            totals,
            d_logps,
            d_entropies,
            out,
            T,
            V,
            *logits.stride(),
            *out.stride(),
            **logits_arguments(temperature, logit_scale, softcap),
            HAS_SOFTCAP=softcap is not None,
            ENTROPY=d_entropies is not None,
            **(BWD_SHAPE_OF_FEW if B * T <= FEW_ROWS else BWD_SHAPE),
        )

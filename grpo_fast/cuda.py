"""Launchers of the CUDA kernels, with the signatures of those of ``grpo_fast.kernels``: raw pointers to ``_C``.

Imported only where the extension is built and the GPU is one that it has code for: ``backend`` sees to that.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from grpo_fast import _C

DTYPES = {
    torch.float32: 0,
    torch.bfloat16: 1,
    torch.float16: 2,
    torch.float64: 3,
    torch.bool: 4,
    torch.uint8: 5,
    torch.int32: 6,
    torch.int64: 7,
}
TERMS = ("clipped", "cispo", "sapo")
KL_ESTIMATORS = ("none", "k1", "k2", "k3")
SCALES = ("group", "batch", "none")
REDUCTIONS = {"tokens": 1, "sequence_tokens": 2}
NONE = (0, 0)

CONSUMERS = 16  # warps on an SM that do the arithmetic; see csrc/resident.cuh
CLUSTERS = (1, 2, 4, 8, 16)
LOOKAHEAD = 1.1  # what a ring holds, in slices: the next row has to begin to move in
RESERVED = 1024  # bytes that CUDA keeps of a block's shared memory


@functools.lru_cache
def layout(row_bytes: int, device: int, gradient: bool) -> _C.Layout:
    """How rows of ``row_bytes`` are laid out on the chip: the smallest cluster that holds one.

    Two blocks share an SM if a row fits into half of it: one computes while the other waits. A row that no cluster
    holds is read twice. Without a gradient rows pass by, and a block takes one alone.
    """
    shared_memory = torch.cuda.get_device_properties(device).shared_memory_per_multiprocessor
    if not gradient:
        return _fill(shared_memory, 1, 1)
    for blocks, cluster in ((2, 1), *((1, cluster) for cluster in CLUSTERS)):
        found = _fill(shared_memory, blocks, cluster)
        if found.stages * found.chunk_bytes >= LOOKAHEAD * row_bytes / cluster:
            break
    return found


def _fill(shared_memory: int, blocks: int, cluster: int) -> _C.Layout:
    """The layout of ``blocks`` on an SM with as many stages as fit."""
    one, two = (_C.Layout(cluster, CONSUMERS // blocks, stages).shared_bytes for stages in (1, 2))
    return _C.Layout(cluster, CONSUMERS // blocks, 1 + (shared_memory // blocks - RESERVED - one) // (two - one))


def stays(row_bytes: int, device: int) -> bool:
    """Whether a row stays on the chip until its gradient is written, so that this may lie anywhere in the row."""
    found = layout(row_bytes, device, True)
    return found.stages * found.chunk_bytes * found.cluster >= row_bytes


def grpo_loss_rows(
    rows: tuple[Tensor, ...],
    zero_std: Tensor | None,
    out: Tensor | None,
    logits: Tensor,
    completion_ids: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    *inputs: Tensor | None,
    temperature: float,
    logit_scale: float,
    softcap: float | None,
    **options: Any,
) -> None:
    """As ``grpo_fast.kernels.grpo_loss.grpo_loss_rows``; ``inputs`` and ``options`` are those of ``make_loss``.

    For float32 logits ``out`` may also be of half precision, and then each row begin where the logits' row does.

    Raises:
        ValueError: It does, and the chip does not hold a row.
        RuntimeError: A kernel was not launched.
    """
    device, row_bytes = logits.device.index, logits.size(-1) * logits.element_size()
    if out is not None and _in_place_of_another_dtype(out, logits):
        if not stays(row_bytes, device):
            raise ValueError(f"out: got the logits' memory with rows of {row_bytes} bytes, want memory of its own")
        for dim in (0, 1):
            got, want = out.stride(dim), 2 * logits.stride(dim)
            if got != want and logits.size(dim) > 1:
                raise ValueError(f"out: got stride {got} in dim {dim} of the logits' memory, want {want}")
    loss, _memory = make_loss(
        rows,
        zero_std,
        logits.size(0) if cu_seqlens is None else cu_seqlens.numel() - 1,
        logits.size(1),
        completion_ids,
        mask,
        cu_seqlens,
        *inputs,
        **options,
    )
    error = _C.grpo_loss_rows(
        device=device,
        stream=stream(logits),
        rows=_rows(logits, out, completion_ids, temperature, logit_scale, softcap),
        layout=layout(row_bytes, device, out is not None),
        loss=loss,
    )
    check(error, "grpo_loss", logits)


def make_loss(
    rows: Sequence[Tensor],
    zero_std: Tensor | None,
    sequences: int,
    length: int,
    completion_ids: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    advantages: Tensor | None,
    rewards: Tensor | None,
    old_logps: Tensor | None,
    ref_logps: Tensor | None,
    entropy_mask: Tensor | None,
    sampler_ratio: Tensor | None,
    entropy_threshold: Tensor | None,
    num_items: Tensor | None,
    token_weights: Tensor | None,
    entropy_items: Tensor | None,
    *,
    group_size: int,
    divisor: float,
    term: str,
    reduction: str,
    low: float,
    high: float,
    delta: float | None,
    dual_clip: float | None,
    beta: float,
    kl_estimator: str,
    bias_correction: bool,
    tau_pos: float,
    tau_neg: float,
    entropy_coef: float,
    scale_rewards: str,
) -> tuple[_C.Loss, tuple[Tensor | None, ...]]:
    """The batch with its options, as the kernels take it, and memory of theirs to keep until they are launched."""
    N = completion_ids.numel()
    ends = None if cu_seqlens is None else cu_seqlens[1:]
    plan_values = completion_ids.new_empty(3, N, dtype=torch.float32)
    kept = None if mask is None and ends is None else completion_ids.new_empty(N, dtype=torch.uint8)
    d_entropy = plan_values.new_empty(())
    logps, entropies, losses, kls, ratios, clips = (x.data_ptr() for x in rows)
    loss = _C.Loss(
        count=sequences,
        T=length,
        N=N,
        mask=values(mask),
        ends=values(ends),
        entropy_mask=values(entropy_mask),
        advantages=values(advantages),
        per_token_advantages=advantages is not None and advantages.shape == completion_ids.shape,
        rewards=values(rewards),
        group_size=group_size,
        scale_rewards=SCALES.index(scale_rewards),
        sampler_ratio=values(sampler_ratio),
        per_token_sampler_ratio=sampler_ratio is not None and sampler_ratio.shape == completion_ids.shape,
        reduction=REDUCTIONS.get(reduction, 0),
        divisor=divisor,
        num_items=values(num_items),
        token_weights=values(token_weights),
        entropy_coef=entropy_coef,
        entropy_items=values(entropy_items),
        old_logps=values(old_logps),
        ref_logps=values(ref_logps),
        entropy_threshold=values(entropy_threshold),
        term=TERMS.index(term),
        kl_estimator=KL_ESTIMATORS.index(kl_estimator) if beta != 0.0 else 0,
        has_dual_clip=dual_clip is not None,
        bias_correction=bias_correction,
        low=low,
        high=high,
        delta=float("inf") if delta is None else delta,
        dual_clip=1.0 if dual_clip is None else dual_clip,
        beta=beta,
        tau_pos=tau_pos,
        tau_neg=tau_neg,
        plan_values=plan_values.data_ptr(),
        kept=address(kept),
        zero_std=address(zero_std),
        d_entropy=d_entropy.data_ptr(),
        logps=logps,
        entropies=entropies,
        losses=losses,
        kls=kls,
        ratios=ratios,
        clips=clips,
    )
    return loss, (plan_values, kept, d_entropy)


def sum_rows(
    results: Tensor,
    rows: tuple[Tensor, ...],
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    entropy_mask: Tensor | None,
    zero_std: Tensor | None,
    B: int,
    T: int,
    has_kl: bool,
    entropy_coef: float,
) -> None:
    """As ``grpo_fast.kernels._results.sum_rows``."""
    _, entropies, losses, kls, ratios, clips = rows
    partials = results.new_empty(max(B, 1) * _C.PARTIAL + 1)
    error = _C.sum_rows(
        device=results.device.index,
        stream=stream(results),
        count=B,
        T=T,
        N=losses.numel(),
        mask=values(mask),
        ends=values(None if cu_seqlens is None else cu_seqlens[1:]),
        entropy_mask=values(entropy_mask),
        entropies=entropies.data_ptr(),
        losses=losses.data_ptr(),
        kls=kls.data_ptr() if has_kl else 0,
        ratios=ratios.data_ptr(),
        clips=clips.data_ptr(),
        zero_std=address(zero_std),
        entropy_coef=entropy_coef,
        partials=partials.data_ptr(),
        results=results.data_ptr(),
    )
    check(error, "sum_rows", losses)


def selective_log_softmax_fwd(
    logits: Tensor,
    index: Tensor,
    mask: Tensor | None,
    temperature: float,
    logit_scale: float,
    softcap: float | None,
    return_entropy: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As ``grpo_fast.kernels.selective_log_softmax.selective_log_softmax_fwd``."""
    B, T, V = logits.shape
    logps, shifts, totals = (logits.new_empty(B, T, dtype=torch.float32) for _ in range(3))
    entropies = torch.empty_like(logps) if return_entropy else logps.new_empty(0)
    device = logits.device.index
    if B * T > 0:
        error = _C.log_probs(
            device=device,
            stream=stream(logits),
            rows=_rows(logits, None, index, temperature, logit_scale, softcap),
            layout=layout(V * logits.element_size(), device, False),
            kept=address(mask),
            logps=logps.data_ptr(),
            entropies=entropies.data_ptr() if return_entropy else 0,
            shifts=shifts.data_ptr(),
            totals=totals.data_ptr(),
        )
        check(error, "selective_log_softmax", logits)
    return logps, entropies, shifts, totals


def selective_log_softmax_bwd(
    out: Tensor,
    logits: Tensor,
    index: Tensor,
    mask: Tensor | None,
    logps: Tensor,
    entropies: Tensor | None,
    shifts: Tensor,
    totals: Tensor,
    d_logps: Tensor,
    d_entropies: Tensor | None,
    temperature: float,
    logit_scale: float,
    softcap: float | None,
) -> None:
    """As ``grpo_fast.kernels.selective_log_softmax.selective_log_softmax_bwd``.

    Raises:
        ValueError: ``out`` is of another dtype in the logits' memory.
        RuntimeError: The kernel was not launched.
    """
    if _in_place_of_another_dtype(out, logits):
        raise ValueError(f"out: got {out.dtype} in the memory of {logits.dtype} logits, want memory of its own")
    if index.numel() > 0:
        error = _C.log_probs_gradient(
            device=logits.device.index,
            stream=stream(logits),
            rows=_rows(logits, out, index, temperature, logit_scale, softcap),
            kept=address(mask),
            logps=logps.data_ptr(),
            entropies=address(entropies),
            shifts=shifts.data_ptr(),
            totals=totals.data_ptr(),
            d_logps=d_logps.data_ptr(),
            d_entropies=address(d_entropies),
        )
        check(error, "selective_log_softmax", logits)


def scale_gradient(gradient: Tensor, factor: Tensor) -> None:
    """As ``grpo_fast.kernels.scale_gradient.scale_gradient``."""
    B, T, V = gradient.shape
    if B * T > 0:
        error = _C.scale_gradient(
            device=gradient.device.index,
            stream=stream(gradient),
            gradient=values(gradient),
            strides=gradient.stride()[:2],
            count=B * T,
            T=T,
            V=V,
            factor=factor.float().data_ptr(),
        )
        check(error, "scale_gradient", gradient)


def _in_place_of_another_dtype(out: Tensor, logits: Tensor) -> bool:
    return out.dtype != logits.dtype and out.numel() > 0 and out.data_ptr() == logits.data_ptr()


def logit_options(temperature: float, logit_scale: float, softcap: float | None) -> dict[str, Any]:
    if softcap is None:
        return {"has_softcap": False, "slope": logit_scale / temperature, "cap": 1.0, "cap_in": 1.0}
    return {"has_softcap": True, "slope": 1.0 / temperature, "cap": softcap, "cap_in": logit_scale / softcap}


def _rows(
    logits: Tensor, out: Tensor | None, ids: Tensor, temperature: float, logit_scale: float, softcap: float | None
) -> _C.Rows:
    return _C.Rows(
        logits=values(logits),
        strides=logits.stride()[:2],
        out=values(out),
        out_strides=(0, 0) if out is None else out.stride()[:2],
        count=ids.numel(),
        T=logits.size(1),
        V=logits.size(2),
        ids=values(ids),
        **logit_options(temperature, logit_scale, softcap),
    )


def values(x: Tensor | None) -> tuple[int, int]:
    return NONE if x is None else (x.data_ptr(), DTYPES[x.dtype])


def stream(x: Tensor) -> int:
    """The current one of its device; ``torch.cuda.current_stream`` takes as long as all else of a launch does."""
    return torch._C._cuda_getCurrentRawStream(x.device.index)


def address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def check(error: int, op: str, x: Tensor) -> None:
    if error != 0:
        shape = f"{tuple(x.shape)} {str(x.dtype).removeprefix('torch.')} on {x.device}"
        raise RuntimeError(f"impl='cuda': {op} of {shape}: CUDA error {error}, {_C.error_string(error)}")

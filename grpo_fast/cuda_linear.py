"""Launchers of the CUDA kernels that take hidden states: on Hopper, logits stay in the registers of their product.

What the gradient needs of them is kept in 16 bits each, where the gradient then goes (csrc/exponential.cuh).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from grpo_fast import _C
from grpo_fast.cuda import address, check, logit_options, make_loss, stream, values


def takes(hidden: Tensor, weight: Tensor) -> bool:
    """Whether these can be given: both in the same half precision, in rows at multiples of 16 bytes, on Hopper."""
    capability = torch.cuda.get_device_capability(hidden.device)
    half = hidden.dtype == weight.dtype and hidden.dtype in (torch.bfloat16, torch.float16)
    aligned = all(x.stride(-1) == 1 and x.stride(0) % 8 == 0 and x.data_ptr() % 16 == 0 for x in (hidden, weight))
    return capability == (9, 0) and "90a" in _C.architectures.split() and half and aligned


def linear_logps_fwd(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    index: Tensor,
    temperature: float,
    logit_scale: float,
    softcap: float | None,
    return_entropy: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(logps, entropies, shifts, totals), (N,) each, of ``hidden`` (N, H) and ``weight`` (V, H).

    Raises:
        RuntimeError: A kernel was not launched.
    """
    bias = None if bias is None else bias.float()
    logps, shifts, totals = hidden.new_empty(3, hidden.size(0), dtype=torch.float32).unbind()
    entropies = torch.empty_like(logps) if return_entropy else logps.new_empty(0)
    partials = _partials(hidden)
    error = _C.linear_log_probs(
        device=hidden.device.index,
        stream=stream(hidden),
        head=_head(hidden, weight, bias, index, temperature, logit_scale, softcap),
        exponentials=_C.Exponentials(values=0, stride=0, bases=0),
        partials=partials.data_ptr(),
        logps=logps.data_ptr(),
        entropies=entropies.data_ptr() if return_entropy else 0,
        shifts=shifts.data_ptr(),
        totals=totals.data_ptr(),
    )
    check(error, "linear_selective_log_softmax", hidden)
    return logps, entropies, shifts, totals


def linear_logps_bwd(
    out: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
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
    """The gradient of the logits to ``out`` (N, V), from upstream ones of what ``linear_logps_fwd`` returned.

    Raises:
        RuntimeError: A kernel was not launched.
    """
    bias = None if bias is None else bias.float()
    N = hidden.size(0)
    bases, slopes, partials = (hidden.new_empty(N, k, dtype=torch.float32) for k in (1, 4, 4 * _lanes(hidden)))
    head = _head(hidden, weight, bias, index, temperature, logit_scale, softcap)
    exponentials = _C.Exponentials(values=out.data_ptr(), stride=out.stride(0), bases=bases.data_ptr())
    device = hidden.device.index
    error = _C.linear_log_probs(
        device=device,
        stream=stream(hidden),
        head=head,
        exponentials=exponentials,
        partials=partials.data_ptr(),
        logps=0,
        entropies=0,
        shifts=0,
        totals=0,
    )
    check(error, "linear_selective_log_softmax", hidden)
    error = _C.linear_log_probs_gradient(
        device=device,
        stream=stream(hidden),
        head=head,
        exponentials=exponentials,
        kept=address(mask),
        logps=logps.data_ptr(),
        entropies=address(entropies),
        shifts=shifts.data_ptr(),
        totals=totals.data_ptr(),
        d_logps=d_logps.data_ptr(),
        d_entropies=address(d_entropies),
        slopes=slopes.data_ptr(),
    )
    check(error, "linear_selective_log_softmax", hidden)


def linear_loss_rows(
    rows: Sequence[Tensor],
    out: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    completion_ids: Tensor,
    *inputs: Tensor | None,
    temperature: float,
    logit_scale: float,
    softcap: float | None,
    **options: Any,
) -> None:
    """``cuda.grpo_loss_rows`` of one sequence from its hidden states (N, H), its further arguments as there.

    ``out`` is (N, V), for the gradient of the logits in the precision of the head.

    Raises:
        RuntimeError: A kernel was not launched.
    """
    bias = None if bias is None else bias.float()
    N = hidden.size(0)
    bases, slopes, partials = (hidden.new_empty(N, k, dtype=torch.float32) for k in (1, 4, 4 * _lanes(hidden)))
    loss, _memory = make_loss(rows, None, 1, N, completion_ids, *inputs, **options)
    exponentials = _C.Exponentials(values=0, stride=0, bases=0)
    if out is not None:
        exponentials = _C.Exponentials(values=out.data_ptr(), stride=out.stride(0), bases=bases.data_ptr())
    error = _C.linear_loss_rows(
        device=hidden.device.index,
        stream=stream(hidden),
        head=_head(hidden, weight, bias, completion_ids, temperature, logit_scale, softcap),
        exponentials=exponentials,
        loss=loss,
        partials=partials.data_ptr(),
        slopes=slopes.data_ptr(),
    )
    check(error, "linear_grpo_loss", hidden)


def _multiprocessors(x: Tensor) -> int:
    return torch.cuda.get_device_properties(x.device).multi_processor_count


def _lanes(hidden: Tensor) -> int:
    return _C.linear_lanes(hidden.size(0), _multiprocessors(hidden))


def _partials(hidden: Tensor) -> Tensor:
    return hidden.new_empty(_lanes(hidden), hidden.size(0), 4, dtype=torch.float32)


def _head(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    index: Tensor,
    temperature: float,
    logit_scale: float,
    softcap: float | None,
) -> _C.Head:
    return _C.Head(
        hidden=values(hidden),
        hidden_stride=hidden.stride(0),
        weight=values(weight),
        weight_stride=weight.stride(0),
        bias=address(bias),
        count=hidden.size(0),
        V=weight.size(0),
        H=weight.size(1),
        ids=values(index),
        multiprocessors=_multiprocessors(hidden),
        **logit_options(temperature, logit_scale, softcap),
    )

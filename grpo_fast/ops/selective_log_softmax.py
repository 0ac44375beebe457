"""Log-probabilities of chosen tokens, and entropy, from logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from grpo_fast import backend
from grpo_fast.ops._checks import IDS, MASKS, Shapes, check_logits_options, check_vocabulary
from grpo_fast.ops._library import differentiable_once, gradient_buffer
from grpo_fast.ops._row_kernels import row_kernels
from grpo_fast.ops._vocabulary_parallel import (
    local_shards,
    merge_rows,
    shard_index,
    sharded_logps_ref,
    upstream_in_shard,
)
from grpo_fast.reference import logps_and_entropy_ref


def selective_log_softmax(
    logits: Tensor,
    index: Tensor,
    *,
    mask: Tensor | None = None,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    return_entropy: bool = False,
    overwrite_logits: bool = False,
    process_group: torch.distributed.ProcessGroup | None = None,
    impl: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """log softmax(z / temperature)[index], with z = softcap * tanh(logit_scale * logits / softcap).

    Args:
        logits: (..., V) float, any strides. -inf is a banned token.
        index: (...,) int. Outside [0, V) the result is NaN.
        mask: (...,); where it is 0 the result is 0 and no gradient flows, whatever logits and index hold.
        temperature: Divides the logits, after scale and softcap.
        logit_scale: Multiplies the logits.
        softcap: Bound of the logits in the manner of Gemma 2; None for none.
        return_entropy: Also return the entropy of each position in nats, differentiable.
        overwrite_logits: The backward writes the gradient over the logits instead of into a buffer as large, so there
            is no second backward. The ``"torch"`` implementation leaves them alone.
        process_group: ``logits`` are this rank's shard of the vocabulary, a contiguous part in the order of the
            ranks, of any size. The other arguments are the same on every rank, ``index`` in ids of the whole
            vocabulary, and so are the results. A DTensor sharded on its last dimension brings its group along. The
            ranks exchange 32 bytes a row, and, outside of a CUDA graph, the host waits for their sizes.
        impl: None, or an implementation by name.

    Returns:
        logps (...,), or (logps, entropy); float32, or float64 for float64 logits. Differentiable in ``logits``.

    Raises:
        ValueError, TypeError: An argument is wrong; the message names it.
        RuntimeError: ``impl`` cannot run here.
    """
    group, (logits,) = local_shards(process_group, -1, logits=logits)
    shapes = Shapes()
    token_dims = tuple(f"dim {i}" for i in range(logits.dim() - 1)) if isinstance(logits, Tensor) else ()
    shapes.check("logits", logits, (*token_dims, "V"))
    shapes.check("index", index, token_dims, dtypes=IDS)
    shapes.optional("mask", mask, token_dims, dtypes=MASKS)
    check_vocabulary(shapes.dims["V"], group)
    check_logits_options(temperature, logit_scale, softcap)
    logps, entropy = logps_and_entropy(
        logits,
        index,
        mask=mask,
        temperature=temperature,
        logit_scale=logit_scale,
        softcap=softcap,
        return_entropy=return_entropy,
        overwrite_logits=overwrite_logits,
        impl=backend.choose("selective_log_softmax", impl, logits),
        group=group,
    )
    return (logps, entropy) if return_entropy else logps


def logps_and_entropy(
    logits: Tensor,
    index: Tensor,
    *,
    mask: Tensor | None,
    temperature: float,
    logit_scale: float,
    softcap: float | None,
    return_entropy: bool,
    overwrite_logits: bool,
    impl: str,
    group: str | None,
) -> tuple[Tensor, Tensor]:
    """(logps, entropy) by ``impl``, over arguments that are checked; the entropy may be empty unless asked for."""
    if group is not None:
        index = shard_index(index, logits.size(-1), 0, False, True, group)
    if impl == "torch":
        options: dict[str, Any] = dict(temperature=temperature, logit_scale=logit_scale, softcap=softcap)
        if group is not None:
            return sharded_logps_ref(logits, index, mask, group, **options)
        return logps_and_entropy_ref(logits, index, mask=mask, **options)
    shape = index.shape
    # Rows are (B, T): any strides of these two are taken as they are, and a view is enough for (N, V) and (V,).
    rows = logits.reshape(-1, *logits.shape[-2:]) if logits.dim() > 2 else logits.reshape(1, -1, logits.size(-1))
    index = index.reshape(rows.shape[:2]).contiguous()
    if mask is not None:
        mask = mask.reshape(rows.shape[:2]).bool().contiguous()
    logps, entropy, _, _ = _selective_log_softmax(
        rows, index, mask, temperature, logit_scale, softcap, return_entropy, overwrite_logits, impl, group
    )
    return logps.view(shape), entropy.view(shape) if return_entropy else entropy


@torch.library.custom_op("grpo_fast::selective_log_softmax", mutates_args=())
def _selective_log_softmax(
    logits: Tensor,
    index: Tensor,
    mask: Tensor | None,
    temperature: float,
    logit_scale: float,
    softcap: float | None,
    return_entropy: bool,
    overwrite_logits: bool,
    impl: str,
    group: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """With a ``group``, ``index`` is ``shard_index``'s, and the results are those of the whole vocabulary."""
    results: tuple[Tensor, Tensor, Tensor, Tensor] = row_kernels(impl).logps(
        logits, index, mask, temperature, logit_scale, softcap, return_entropy
    )
    return results if group is None else merge_rows(index, logits.size(-1), mask, *results, group)


@_selective_log_softmax.register_fake
def _(
    logits: Tensor,
    index: Tensor,
    mask: Tensor | None,
    temperature: float,
    logit_scale: float,
    softcap: float | None,
    return_entropy: bool,
    overwrite_logits: bool,
    *_: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    logps, shifts, totals = (logits.new_empty(index.shape, dtype=torch.float32) for _ in range(3))
    entropy = logits.new_empty(index.shape if return_entropy else (0,), dtype=torch.float32)
    return logps, entropy, shifts, totals


@torch.library.custom_op("grpo_fast::selective_log_softmax_backward", mutates_args=("out",))
def _selective_log_softmax_backward(
    out: Tensor,
    logits: Tensor | None,
    index: Tensor,
    mask: Tensor | None,
    logps: Tensor,
    entropy: Tensor,
    shifts: Tensor,
    totals: Tensor,
    d_logps: Tensor,
    d_entropy: Tensor | None,
    temperature: float,
    logit_scale: float,
    softcap: float | None,
    impl: str,
    group: str | None,
) -> None:
    """Write the gradient of the logits into ``out``, which holds the logits where ``logits`` is None."""
    source = out if logits is None else logits
    if group is not None:
        entropy, d_logps, d_entropy = upstream_in_shard(index, source.size(-1), entropy, d_logps, d_entropy)
    row_kernels(impl).logps_backward(
        out,
        source,
        index,
        mask,
        logps,
        entropy,
        shifts,
        totals,
        d_logps,
        d_entropy,
        temperature,
        logit_scale,
        softcap,
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, index, mask, *options, _, overwrite, impl, group = inputs
    logps, entropy, shifts, totals = output
    ctx.mark_non_differentiable(shifts, totals)
    ctx.set_materialize_grads(False)  # an entropy that nothing depends on costs the backward nothing
    ctx.save_for_backward(logits, index, mask, logps, entropy, shifts, totals)
    ctx.options, ctx.overwrite = (*options, impl, group), overwrite


@differentiable_once
def _backward(ctx: Any, d_logps: Tensor | None, d_entropy: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    logits, index, mask, logps, entropy, shifts, totals = ctx.saved_tensors
    out = logits.detach() if ctx.overwrite else gradient_buffer(logits)
    _selective_log_softmax_backward(
        out,
        None if ctx.overwrite else logits,
        index,
        mask,
        logps,
        entropy,
        shifts,
        totals,
        torch.zeros_like(logps) if d_logps is None else d_logps.contiguous(),
        None if d_entropy is None else d_entropy.contiguous(),
        *ctx.options,
    )
    return out, *[None] * 9


_selective_log_softmax.register_autograd(_backward, setup_context=_setup_context)

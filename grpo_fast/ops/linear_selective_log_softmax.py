"""Log-probabilities of chosen tokens, and entropy, from hidden states: the logits are never whole in memory."""

from __future__ import annotations

import torch
from torch import Tensor

from grpo_fast import backend
from grpo_fast.ops._checks import IDS, MASKS, Shapes, check_logits_options, check_vocabulary
from grpo_fast.ops._linear_logps import linear_logps
from grpo_fast.ops._sparse import check_sparse_grad_tol
from grpo_fast.ops._vocabulary_parallel import local_shards
from grpo_fast.ops._workspace import check_workspace


def linear_selective_log_softmax(
    hidden: Tensor,
    weight: Tensor,
    index: Tensor,
    *,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    return_entropy: bool = False,
    workspace_bytes: int | None = None,
    allow_sync: bool = True,
    sparse_grad_tol: float | None = None,
    process_group: torch.distributed.ProcessGroup | None = None,
    impl: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """``selective_log_softmax`` of the logits ``hidden @ weight.T + bias``.

    The forward is one matrix product. The backward takes one more for each of ``hidden`` and ``weight`` that requires
    a gradient. Before that it computes the logits again, of the rows whose upstream gradient is not 0, unless the
    forward has kept them: on Hopper, in bfloat16, without a softcap, ``process_group`` or ``torch.compile``, 2 bytes
    a logit are kept from the forward to the first backward if the workspace holds them all. It computes them again
    nevertheless if that is for less than two thirds of the rows.

    If ``hidden`` alone requires a gradient, with neither ``return_entropy`` nor ``sparse_grad_tol`` nor
    ``process_group``, the kernels' forward makes the log-probs' gradients by it too, with a second product. They are
    kept, in float32 and as large as ``hidden``, and the backward only scales them, any number of times, but not for a
    second derivative.

    Args:
        hidden: (..., H) float, the states that the head turns into logits.
        weight: (V, H) float, the head (lm_head). May be of another precision than ``hidden``; the logits are
            accumulated in float32 (float64 if either is) and never rounded.
        index: (...,) int. Outside [0, V) the result is NaN.
        bias: (V,) float.
        mask: (...,); positions where it is 0 are not projected: their result is 0, and no gradient flows.
        temperature, logit_scale, softcap, return_entropy, impl: As in ``selective_log_softmax``.
        workspace_bytes: As in ``linear_grpo_loss``. What is kept for the backward takes it from the forward on, and
            what the gradient of ``weight`` will take: of several calls before a backward, each.
        allow_sync: The host waits for the GPU to learn how many positions the mask keeps, unless kernels find out by
            themselves: on Hopper, in half precision, without a gradient, up to 8,192 positions. If it may not, or
            while a CUDA graph is captured, every position is projected; the result is the same.
        sparse_grad_tol: As in ``linear_grpo_loss``, for the backward.
        process_group: ``weight`` and ``bias`` are this rank's shard of the vocabulary, a contiguous part in the order
            of the ranks, of any size. The other arguments are the same on every rank, ``index`` in ids of the whole
            vocabulary, and so are the results. The gradient of ``hidden`` is that of the whole vocabulary, added up
            over the ranks in float32 while the weight's is computed; a weight's is its own. A DTensor with
            ``Shard(0)`` on a mesh of one dimension brings its group along. With ``allow_sync`` the host waits for
            the shards' sizes, and ranks that disagree raise. The ranks exchange 32 bytes a position in the forward,
            and 4 H in the backward if ``hidden`` requires a gradient.

    Returns:
        logps (...,), or (logps, entropy); float32, or float64 for float64 inputs. Differentiable in ``hidden``,
        ``weight`` and ``bias``, whichever require it.

    Raises:
        ValueError, TypeError: An argument is wrong; the message names it.
        RuntimeError: ``impl`` cannot run here.
    """
    group, (weight, bias) = local_shards(process_group, 0, weight=weight, bias=bias)
    shapes = Shapes()
    token_dims = tuple(f"dim {i}" for i in range(hidden.dim() - 1)) if isinstance(hidden, Tensor) else ()
    check_head(shapes, hidden, weight, bias, token_dims, group=group)
    shapes.check("index", index, token_dims, dtypes=IDS)
    shapes.optional("mask", mask, token_dims, dtypes=MASKS)
    check_logits_options(temperature, logit_scale, softcap)
    workspace = check_workspace(workspace_bytes)
    implementation = backend.choose("linear_selective_log_softmax", impl, most_precise(hidden, weight))
    check_sparse_grad_tol(
        sparse_grad_tol,
        hidden,
        weight,
        impl=implementation,
        allow_sync=allow_sync,
        softcap=softcap,
        process_group=group,
    )
    logps, entropy = linear_logps(
        hidden,
        weight,
        index,
        bias=bias,
        mask=mask,
        temperature=temperature,
        logit_scale=logit_scale,
        softcap=softcap,
        return_entropy=return_entropy,
        workspace_bytes=workspace,
        allow_sync=allow_sync,
        sparse_grad_tol=sparse_grad_tol,
        impl=implementation,
        group=group,
    )
    return (logps, entropy) if return_entropy else logps


def check_head(
    shapes: Shapes,
    hidden: object,
    weight: object,
    bias: object,
    token_dims: tuple[str, ...],
    of: str = "",
    group: str | None = None,
) -> None:
    """Check hidden states with the head that projects them; ``of`` prefixes the names and the hidden size."""
    shapes.check(f"{of}hidden", hidden, (*token_dims, f"{of}H"))
    shapes.check(f"{of}weight", weight, ("V", f"{of}H"))
    shapes.optional(f"{of}bias", bias, ("V",))
    check_vocabulary(shapes.dims["V"], group)


def most_precise(first: Tensor, *others: Tensor) -> Tensor:
    """Whichever fixes the precision of the logits: one in float64, if any is."""
    return next((x for x in others if x.dtype == torch.float64), first)

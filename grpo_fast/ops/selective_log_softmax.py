"""Log-probabilities of chosen tokens, and entropy, from logits."""

from __future__ import annotations

from torch import Tensor

from grpo_fast import backend
from grpo_fast.ops._checks import IDS, MASKS, Shapes, check_logits_options, check_vocabulary
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
        impl: None, or an implementation by name.

    Returns:
        logps (...,), or (logps, entropy); float32, or float64 for float64 logits. Differentiable in ``logits``.

    Raises:
        ValueError, TypeError: An argument is wrong; the message names it.
        RuntimeError: ``impl`` cannot run here.
    """
    shapes = Shapes()
    token_dims = tuple(f"dim {i}" for i in range(logits.dim() - 1)) if isinstance(logits, Tensor) else ()
    shapes.check("logits", logits, (*token_dims, "V"))
    shapes.check("index", index, token_dims, dtypes=IDS)
    shapes.optional("mask", mask, token_dims, dtypes=MASKS)
    check_vocabulary(shapes.dims["V"])
    check_logits_options(temperature, logit_scale, softcap)
    backend.choose("selective_log_softmax", impl, logits.device)
    logps, entropy = logps_and_entropy_ref(
        logits, index, mask=mask, temperature=temperature, logit_scale=logit_scale, softcap=softcap
    )
    return (logps, entropy) if return_entropy else logps

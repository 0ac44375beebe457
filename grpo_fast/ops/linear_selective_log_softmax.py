"""Log-probabilities of chosen tokens, and entropy, from hidden states: the logits are never whole in memory."""

from __future__ import annotations

from torch import Tensor

from grpo_fast import backend
from grpo_fast.ops._checks import IDS, MASKS, Shapes, check_logits_options, check_vocabulary
from grpo_fast.reference import linear_logps_ref


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
    impl: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """``selective_log_softmax`` of the logits ``hidden @ weight.T + bias``.

    Args:
        hidden: (..., H) float, the states that the head turns into logits.
        weight: (V, H) float, the head (lm_head). May be of another precision than ``hidden``; the logits are
            accumulated in float32 (float64 if either is) and never rounded.
        index: (...,) int. Outside [0, V) the result is NaN.
        bias: (V,) float.
        mask: (...,); positions where it is 0 are not projected: their result is 0, and no gradient flows.
        temperature, logit_scale, softcap, return_entropy, impl: As in ``selective_log_softmax``.

    Returns:
        logps (...,), or (logps, entropy); float32, or float64 for float64 inputs. Differentiable in ``hidden``,
        ``weight`` and ``bias``, whichever require it.

    Raises:
        ValueError, TypeError: An argument is wrong; the message names it.
        RuntimeError: ``impl`` cannot run here.
    """
    shapes = Shapes()
    token_dims = tuple(f"dim {i}" for i in range(hidden.dim() - 1)) if isinstance(hidden, Tensor) else ()
    check_head(shapes, hidden, weight, bias, token_dims)
    shapes.check("index", index, token_dims, dtypes=IDS)
    shapes.optional("mask", mask, token_dims, dtypes=MASKS)
    check_logits_options(temperature, logit_scale, softcap)
    backend.choose("linear_selective_log_softmax", impl, hidden)
    logps, entropy = linear_logps_ref(
        hidden,
        weight,
        index,
        bias=bias,
        mask=mask,
        temperature=temperature,
        logit_scale=logit_scale,
        softcap=softcap,
    )
    return (logps, entropy) if return_entropy else logps


def check_head(
    shapes: Shapes, hidden: object, weight: object, bias: object, token_dims: tuple[str, ...], of: str = ""
) -> None:
    """Check hidden states with the head that projects them; ``of`` prefixes the names and the hidden size."""
    shapes.check(f"{of}hidden", hidden, (*token_dims, f"{of}H"))
    shapes.check(f"{of}weight", weight, ("V", f"{of}H"))
    shapes.optional(f"{of}bias", bias, ("V",))
    check_vocabulary(shapes.dims["V"])

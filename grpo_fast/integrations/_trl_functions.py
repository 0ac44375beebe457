"""What TRL's trainers compute from hidden states and heads without logits, by our ops in place of TRL's functions."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import trl.trainer.distillation_trainer as trl_distillation
import trl.trainer.utils as trl_utils
from torch import Tensor

from grpo_fast.backend import check_impl
from grpo_fast.integrations import WORKSPACE_BYTES
from grpo_fast.integrations._causal_lm import as_autocast, whole, whole_bias
from grpo_fast.ops.linear_distillation_loss import linear_distillation_loss
from grpo_fast.ops.linear_selective_log_softmax import linear_selective_log_softmax

_THEIR_LOG_PROBS = trl_utils._ChunkedLogProbFunction
_THEIR_DIVERGENCE = trl_distillation.ChunkedDivergenceFunction


def patch_trl(*, impl: str | None = None) -> None:
    """Let every trainer of TRL that needs no logits (GRPO, RLOO, DPO, KTO, SFT, distillation) do without by our ops.

    Log-probs and entropy come from ``linear_selective_log_softmax``. Whether a label is the most likely token, the
    mean logit and the sum of squared probabilities, which SFT, DPO and KTO report as metrics, are still TRL's, at
    the price of a matrix product. The divergence of ``DistillationTrainer`` comes from ``linear_distillation_loss``,
    and the student's entropy, which it reports, from one more product. Trainers made before are patched too; patching
    again changes the option.

    What is around these functions stays TRL's. So, where FSDP2 has the head in a group of its own, each rank's
    gradient of it is of its own batch alone, as in TRL 1.16; ``FastGRPOTrainer`` averages it over ranks.

    Args:
        impl: As in the ops. ``"cuda"`` raises where a trainer asks for a divergence, which has no such kernel.

    Raises:
        ValueError: ``impl`` is no implementation's name.
    """
    check_impl(impl)
    trl_utils._ChunkedLogProbFunction = _LinearLogProbs(impl)
    trl_distillation.ChunkedDivergenceFunction = _LinearDivergence(impl)


def unpatch_trl() -> None:
    """Give TRL its own functions back; nothing, if it has them."""
    trl_utils._ChunkedLogProbFunction = _THEIR_LOG_PROBS
    trl_distillation.ChunkedDivergenceFunction = _THEIR_DIVERGENCE


@contextmanager
def log_probs_by(impl: str | None) -> Iterator[None]:
    """TRL's log-probs by our op in here, whether or not TRL is patched."""
    before = trl_utils._ChunkedLogProbFunction
    trl_utils._ChunkedLogProbFunction = _LinearLogProbs(impl)
    try:
        yield
    finally:
        trl_utils._ChunkedLogProbFunction = before


class _LinearLogProbs:
    """Stands where TRL has its ``ChunkedLogProbFunction``, of which it only calls ``apply``."""

    def __init__(self, impl: str | None) -> None:
        self.impl = impl

    def apply(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        chunk_size: int,
        final_logit_softcapping: float | None = None,
        logit_scale: float = 1.0,
        outputs: tuple[str, ...] = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1"),
    ) -> tuple[Tensor | None, ...]:
        """(log-probs, entropy, log of the sum of squared probabilities, mean logit, is the target the most likely).

        Of hidden (N, H), weight (V, H), bias (V,) and targets (N,); what ``outputs`` does not name is None.
        """
        found = linear_selective_log_softmax(
            as_autocast(hidden),
            as_autocast(whole(weight)),
            targets,
            bias=whole_bias(bias),
            temperature=temperature,
            logit_scale=logit_scale,
            softcap=final_logit_softcapping,
            return_entropy="entropy" in outputs,
            workspace_bytes=WORKSPACE_BYTES,
            impl=self.impl,
        )
        logps, entropy = found if isinstance(found, tuple) else (found, None)
        theirs = tuple(name for name in outputs if name not in ("log_probs", "entropy"))
        if not theirs:
            return logps, entropy, None, None, None
        with torch.no_grad():
            _, _, *rest = _THEIR_LOG_PROBS.apply(
                hidden,
                weight,
                bias,
                targets,
                temperature,
                chunk_size,
                final_logit_softcapping,
                logit_scale,
                theirs,
            )
        return logps, entropy, *rest


class _LinearDivergence:
    """Stands where TRL has its ``ChunkedDivergenceFunction``, of which it only calls ``apply``."""

    def __init__(self, impl: str | None) -> None:
        self.impl = impl

    def apply(
        self,
        student_hidden: Tensor,
        student_weight: Tensor,
        student_bias: Tensor | None,
        teacher_hidden: Tensor,
        teacher_weight: Tensor,
        teacher_bias: Tensor | None,
        beta: float,
        temperature: float = 1.0,
        student_logit_scale: float = 1.0,
        student_softcap: float | None = None,
        teacher_logit_scale: float = 1.0,
        teacher_softcap: float | None = None,
    ) -> tuple[Tensor, Tensor]:
        """(divergence, the student's entropy without a gradient), (N,) float32.

        Of hidden (N, student H) and (N, teacher H), weights (V, ...) and biases (V,).
        """
        hidden, weight = as_autocast(student_hidden), as_autocast(whole(student_weight))
        bias = whole_bias(student_bias)
        divergence = linear_distillation_loss(
            hidden,
            weight,
            as_autocast(teacher_hidden),
            as_autocast(whole(teacher_weight)),
            beta=beta,
            student_bias=bias,
            teacher_bias=whole_bias(teacher_bias),
            reduction="none",
            temperature=temperature,
            student_logit_scale=student_logit_scale,
            teacher_logit_scale=teacher_logit_scale,
            student_softcap=student_softcap,
            teacher_softcap=teacher_softcap,
            workspace_bytes=WORKSPACE_BYTES,
            impl=self.impl,
        )
        with torch.no_grad():
            _, entropy = linear_selective_log_softmax(
                hidden,
                weight,
                torch.zeros(hidden.size(0), dtype=torch.int64, device=hidden.device),
                bias=bias,
                temperature=temperature,
                logit_scale=student_logit_scale,
                softcap=student_softcap,
                return_entropy=True,
                workspace_bytes=WORKSPACE_BYTES,
                impl=self.impl,
            )
        return divergence, entropy

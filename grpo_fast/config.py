"""Every option of the GRPO loss, in one frozen dataclass that refuses nonsense."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass, fields
from typing import Literal, get_args

LossType = Literal["grpo", "bnpo", "dr_grpo", "dapo", "luspo", "cispo", "sapo", "vespo"]
ImportanceSamplingLevel = Literal["token", "sequence"]
KLEstimator = Literal["k1", "k2", "k3"]
CispoBounds = Literal["absolute", "relative"]
ScaleRewards = Literal["group", "batch", "none"]

#: Loss types whose per-token term is the clipped probability ratio.
CLIPPED_LOSSES: tuple[str, ...] = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo")


@dataclass(frozen=True, kw_only=True)
class GRPOLossConfig:
    """Options of the GRPO loss. Names and defaults are those of TRL's ``GRPOConfig`` where it has them, but for
    ``epsilon_low``, which is ``epsilon`` there, and ``max_completion_length``, which has no default here.

    Attributes:
        loss_type: The per-token term and its reduction; ``reference.py`` is the definition of each.

            - ``"grpo"`` (DeepSeekMath, arXiv 2402.03300): mean over a sequence's tokens, then over sequences.
            - ``"bnpo"``: sum over the tokens of the local batch, divided by their number.
            - ``"dr_grpo"`` (arXiv 2503.20783): sum divided by ``B * max_completion_length``.
            - ``"dapo"`` (arXiv 2503.14476): sum divided by ``num_items_in_batch``.
            - ``"luspo"`` (arXiv 2602.05261): sum over each sequence, mean over sequences.
            - ``"cispo"`` (MiniMax-M1, arXiv 2506.13585): the clamped ratio, detached, weighs the log-prob.
            - ``"sapo"`` (arXiv 2511.20347): a sigmoid gate in place of the clip.
            - ``"vespo"`` (arXiv 2602.10693): a detached weight from the whole sequence's ratio.
        importance_sampling_level: ``"token"``, or ``"sequence"`` for GSPO (arXiv 2507.18071): one ratio a
            sequence, the exponential of its mean log-ratio.
        epsilon_low: Lower clip: ratios below ``1 - epsilon_low`` are clipped.
        epsilon_high: Upper clip, ``1 + epsilon_high``; None means ``epsilon_low``. For ``cispo`` with absolute
            bounds it is the largest ratio itself (MiniMax-M1 and ScaleRL use values around 5).
        delta: Upper bound on the unclipped ratio (two-sided clipping, arXiv 2505.07291); acts when it is above
            ``1 + epsilon_high``. None for no bound.
        dual_clip: For negative advantages the loss is at most ``dual_clip * |A|`` (arXiv 1912.09729, verl's
            ``clip_ratio_c``, usually 3); None for no bound.
        cispo_bounds: ``"absolute"`` (TRL): ratio at most ``epsilon_high``. ``"relative"`` (verl): ratio within
            ``[1 - epsilon_low, 1 + epsilon_high]``.
        beta: Weight of the KL term; 0 leaves it out, and then no reference log-probs are needed.
        kl_estimator: With d = ref_logp - logp: ``"k1"`` is -d, ``"k2"`` is d^2 / 2, ``"k3"`` is exp(d) - d - 1
            (Schulman, "Approximating KL divergence").
        use_bias_correction_kl: Multiply the KL term by the ratio, before ``delta`` bounds it
            (DeepSeek-V3.2, arXiv 2512.02556, section 3.1).
        sapo_temperature_pos: SAPO's gate temperature for positive advantages.
        sapo_temperature_neg: SAPO's gate temperature for the others.
        vespo_k_pos: VESPO's power of the sequence ratio for non-negative advantages.
        vespo_lambda_pos: VESPO's exponential decay for non-negative advantages.
        vespo_k_neg: The power for negative advantages.
        vespo_lambda_neg: The decay for negative advantages.
        off_policy_mask_threshold: Drop the policy term of sequences with a negative advantage whose mean
            ``sampling_logps - logps`` exceeds this many nats (DeepSeek-V3.2); None keeps all.
        entropy_coef: Weight of the entropy bonus, subtracted from the loss with its gradient.
        scale_rewards: How rewards become advantages: divided by the std of their ``"group"``, of the whole
            ``"batch"``, or by nothing (``"none"``, Dr. GRPO).
        max_completion_length: The constant of ``dr_grpo``, in tokens; None takes the padded length T.

    Raises:
        ValueError: An option is out of its range; the message names it.
        TypeError: An option is of the wrong type.
    """

    loss_type: LossType = "dapo"
    importance_sampling_level: ImportanceSamplingLevel = "token"
    epsilon_low: float = 0.2
    epsilon_high: float | None = None
    delta: float | None = None
    dual_clip: float | None = None
    cispo_bounds: CispoBounds = "absolute"
    beta: float = 0.0
    kl_estimator: KLEstimator = "k3"
    use_bias_correction_kl: bool = True
    sapo_temperature_pos: float = 1.0
    sapo_temperature_neg: float = 1.05
    vespo_k_pos: float = 2.0
    vespo_lambda_pos: float = 3.0
    vespo_k_neg: float = 3.0
    vespo_lambda_neg: float = 2.0
    off_policy_mask_threshold: float | None = None
    entropy_coef: float = 0.0
    scale_rewards: ScaleRewards = "group"
    max_completion_length: int | None = None

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}: got {getattr(self, name)!r}, want one of {', '.join(choices)}")
        if not isinstance(self.use_bias_correction_kl, bool):
            raise TypeError(f"use_bias_correction_kl: got {self.use_bias_correction_kl!r}, want a bool")
        length = self.max_completion_length
        if length is not None and (isinstance(length, bool) or not isinstance(length, int) or length < 1):
            raise ValueError(f"max_completion_length: got {length!r}, want an int of at least 1, or None")
        for field in fields(self):
            if field.name in _LOWER_BOUNDS:
                _check_number(field.name, getattr(self, field.name), optional=field.default is None)
        if self.epsilon_low > 1:
            raise ValueError(f"epsilon_low: got {self.epsilon_low}, want at most 1 (ratios are positive)")
        if self.dual_clip is not None and self.dual_clip <= 1:
            raise ValueError(f"dual_clip: got {self.dual_clip}, want more than 1")
        for name in ("delta", "dual_clip"):
            if getattr(self, name) is not None and self.loss_type not in CLIPPED_LOSSES:
                raise ValueError(
                    f"{name}: got {getattr(self, name)} with loss_type={self.loss_type!r}, which has no clipped "
                    f"ratio; want None, or a loss_type of {', '.join(CLIPPED_LOSSES)}"
                )

    @property
    def clip_high(self) -> float:
        """``epsilon_high``, or ``epsilon_low`` where it is None."""
        return self.epsilon_low if self.epsilon_high is None else self.epsilon_high

    @property
    def divides_by_items(self) -> bool:
        """Whether the loss is divided by ``num_items_in_batch``, the tokens of all processes and micro-batches."""
        return self.loss_type in ("dapo", "cispo", "vespo")


_CHOICES: dict[str, tuple[str, ...]] = {
    "loss_type": get_args(LossType),
    "importance_sampling_level": get_args(ImportanceSamplingLevel),
    "kl_estimator": get_args(KLEstimator),
    "cispo_bounds": get_args(CispoBounds),
    "scale_rewards": get_args(ScaleRewards),
}

# name -> (lower bound, whether the bound itself is allowed)
_LOWER_BOUNDS: dict[str, tuple[float, bool]] = {
    "epsilon_low": (0.0, True),
    "epsilon_high": (0.0, True),
    "delta": (0.0, False),
    "dual_clip": (0.0, False),
    "beta": (0.0, True),
    "sapo_temperature_pos": (0.0, False),
    "sapo_temperature_neg": (0.0, False),
    "vespo_k_pos": (0.0, True),
    "vespo_lambda_pos": (0.0, True),
    "vespo_k_neg": (0.0, True),
    "vespo_lambda_neg": (0.0, True),
    "off_policy_mask_threshold": (-math.inf, False),
    "entropy_coef": (-math.inf, False),
}


def _check_number(name: str, value: object, *, optional: bool) -> None:
    if value is None and optional:
        return
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: got {value!r}, want a number{' or None' if optional else ''}")
    bound, inclusive = _LOWER_BOUNDS[name]
    # Not isfinite, which Dynamo cannot ask a number that changes.
    if not -sys.float_info.max <= value <= sys.float_info.max or value < bound or (value == bound and not inclusive):
        want = "a finite number" + (f" {'>=' if inclusive else '>'} {bound:g}" if math.isfinite(bound) else "")
        raise ValueError(f"{name}: got {value}, want {want}")

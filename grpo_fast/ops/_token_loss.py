"""What the kernel of losses that follow from a token's own row of logits takes, and what its results mean."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from grpo_fast.config import CLIPPED_LOSSES, GRPOLossConfig
from grpo_fast.ops._loss_batch import LossBatch

#: What the kernel's results hold after the loss, in order.
METRICS = (
    "policy_loss",
    "num_active_tokens",
    "entropy",
    "kl",
    "ratio/mean",
    "ratio/max",
    "clip_ratio/low_mean",
    "clip_ratio/low_min",
    "clip_ratio/high_mean",
    "clip_ratio/high_max",
    "clip_ratio/region_mean",
    "frac_reward_zero_std",
)


def term_options(c: GRPOLossConfig) -> dict[str, Any]:
    """The options of a token's term, as the kernel takes them."""
    low, high = 1.0 - c.epsilon_low, 1.0 + c.clip_high
    if c.loss_type == "cispo" and c.cispo_bounds == "absolute":
        low, high = 0.0, c.clip_high
    return dict(
        term=c.loss_type if c.loss_type in ("cispo", "sapo") else "clipped",
        low=low,
        high=high,
        delta=c.delta,
        dual_clip=c.dual_clip,
        beta=c.beta,
        kl_estimator=c.kl_estimator,
        bias_correction=c.use_bias_correction_kl,
        tau_pos=c.sapo_temperature_pos,
        tau_neg=c.sapo_temperature_neg,
        entropy_coef=c.entropy_coef,
    )


def threshold_tensor(batch: LossBatch) -> Tensor | None:
    """The entropy threshold as the kernel takes it."""
    threshold = batch.entropy_threshold
    if isinstance(threshold, (int, float)):
        return torch.full((), threshold, device=batch.completion_ids.device)
    return threshold


def name_results(results: Tensor, batch: LossBatch, zero_std: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and metrics from the kernel's results; ``zero_std`` in place of its own share of groups without spread."""
    loss, *values = results.unbind()
    metrics = {name: value for name, value in zip(METRICS, values, strict=True) if _has_metric(name, batch)}
    if batch.config.loss_type == "cispo":
        metrics["cispo_clip_ratio"] = metrics.pop("clip_ratio/high_mean")
    if zero_std is not None:
        metrics["frac_reward_zero_std"] = zero_std
    return loss, metrics


def _has_metric(name: str, batch: LossBatch) -> bool:
    c = batch.config
    if name == "kl":
        return c.beta != 0.0
    if name == "frac_reward_zero_std":
        return batch.rewards is not None and batch.group_size is not None
    if name == "clip_ratio/high_mean":
        return c.loss_type != "sapo"
    return c.loss_type in CLIPPED_LOSSES or not name.startswith("clip_ratio")

"""verl: our log-probs in place of its fused kernels, and a policy loss called ``grpo_fast``.

Importing this module does both, which is what verl's own settings for external modules do:
``VERL_USE_EXTERNAL_MODULES=grpo_fast.integrations.verl`` in every process, or
``actor_rollout_ref.model.external_lib=grpo_fast.integrations.verl`` where a model is configured. Then
``actor_rollout_ref.model.use_fused_kernels=True`` makes verl's models work without logits, by whichever of its
backends, and ``actor_rollout_ref.actor.policy_loss.loss_mode=grpo_fast`` chooses the loss.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from grpo_fast.integrations import WORKSPACE_BYTES
from grpo_fast.integrations._causal_lm import whole
from grpo_fast.integrations._policy_loss import clipped_policy_loss, mean
from grpo_fast.integrations._versions import require
from grpo_fast.ops.linear_selective_log_softmax import linear_selective_log_softmax
from grpo_fast.ops.selective_log_softmax import selective_log_softmax

require("verl", oldest="0.9", below="0.10")

from verl.trainer.ppo.core_algos import register_policy_loss  # noqa: E402
from verl.utils.experimental.torch_functional import FusedLinearForPPO  # noqa: E402


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    temperature: float = 1.0,
    reduction: str = "none",
    dist_process_group: Any = None,
) -> tuple[Tensor, Tensor]:
    """(log-probs of ``labels``, entropy), (N,) float32 each, as verl's function of that name has them.

    Args:
        hidden: (..., H) float, N rows in all.
        weight: (V, H) float.
        labels: (...,) int.
        temperature: What the logits are divided by.
        reduction: ``"none"``.
        dist_process_group: None, or a group of one rank.

    Raises:
        ValueError: For another ``reduction``; for a group of several ranks, each with a shard of the vocabulary
            (Megatron wants to add up their gradients itself); for a tensor as temperature.
    """
    if reduction.lower() != "none":
        raise ValueError(f"reduction: got {reduction!r}, want 'none'")
    if dist_process_group is not None and dist_process_group.size() > 1:
        raise ValueError(
            f"dist_process_group: got {dist_process_group.size()} ranks, want one (a vocabulary in shards is not "
            "supported)"
        )
    return _log_probs_and_entropy(hidden.reshape(-1, hidden.size(-1)), weight, labels.reshape(-1), temperature)


def fused_linear_forward(
    self: FusedLinearForPPO,
    hidden_states: Tensor,
    vocab_weights: Tensor,
    input_ids: Tensor,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """(log-probs of ``input_ids`` (...,), entropy), float32, in place of ``FusedLinearForPPO.forward``."""
    return _log_probs_and_entropy(hidden_states, vocab_weights, input_ids.long(), temperature)


def _log_probs_and_entropy(hidden: Tensor, weight: Tensor, ids: Tensor, temperature: Any) -> tuple[Tensor, Tensor]:
    if not isinstance(temperature, (int, float)):
        raise ValueError(f"temperature: got {type(temperature).__name__}, want one number for all tokens")
    found = linear_selective_log_softmax(
        hidden,
        whole(weight),
        ids,
        temperature=temperature,
        return_entropy=True,
        workspace_bytes=WORKSPACE_BYTES,
    )
    assert isinstance(found, tuple)
    return found


def logprobs_from_logits(logits: Tensor, labels: Tensor, inplace_backward: bool = True) -> Tensor:
    """Log-probs (...,) of ``labels`` (...,) from ``logits`` (..., V), float32; logits are left as they are.

    ``inplace_backward`` is verl's permission to overwrite them, of which nothing is made.
    """
    found = selective_log_softmax(logits, labels)
    assert isinstance(found, Tensor)
    return found


def entropy_from_logits(logits: Tensor) -> Tensor:
    """Entropy (...,) in nats of ``logits`` (..., V), float32."""
    index = torch.zeros(logits.shape[:-1], dtype=torch.long, device=logits.device)
    found = selective_log_softmax(logits, index, return_entropy=True)
    assert isinstance(found, tuple)
    return found[1]


def policy_loss(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "token-mean",
    config: Any = None,
    rollout_is_weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """verl's ``vanilla`` loss, the clipped ratio with dual clip, by the definition that the ops have.

    Args:
        old_log_prob, log_prob, advantages: (B, T) float.
        response_mask: (B, T).
        loss_agg_mode: Any of verl's.
        config: The actor's configuration: ``clip_ratio``, ``clip_ratio_low``, ``clip_ratio_high``, ``clip_ratio_c``
            (3 by default) and ``global_batch_info``.
        rollout_is_weights: (B, T) float.

    Returns:
        (loss, metrics under verl's names).

    Raises:
        ValueError: An option is out of its range; the message names it.
    """
    low, high = config.clip_ratio_low, config.clip_ratio_high
    dual_clip = config.get("clip_ratio_c", 3.0)
    log_ratio = (log_prob - old_log_prob).clamp(-20.0, 20.0)
    of_means, divisor, dp_size = _aggregation(loss_agg_mode, response_mask, **config.global_batch_info)
    loss, clipped = clipped_policy_loss(
        log_ratio,
        advantages,
        response_mask,
        of_means=of_means,
        divisor=divisor,
        weights=rollout_is_weights,
        epsilon_low=config.clip_ratio if low is None else low,
        epsilon_high=config.clip_ratio if high is None else high,
        dual_clip=dual_clip,
    )
    with torch.no_grad():
        dual_clipped = (log_ratio.exp() > dual_clip) & (advantages < 0)
        means = (clipped, mean(-log_ratio, response_mask), mean(dual_clipped.to(log_ratio.dtype), response_mask))
        values = torch.stack(means).tolist()
    names = ("actor/pg_clipfrac", "actor/ppo_kl", "actor/pg_clipfrac_lower")
    return loss * dp_size, dict(zip(names, values, strict=True))


def _aggregation(
    mode: str,
    mask: Tensor,
    dp_size: int = 1,
    batch_num_tokens: int | None = None,
    global_batch_size: int | None = None,
    loss_scale_factor: int | None = None,
) -> tuple[bool, float | Tensor | None, int]:
    """(whether sequences are averaged, what their sum is divided by, and multiplied): verl divides by all ranks'."""
    by_token = mode in ("token-mean", "token-sum")
    name, count = ("batch_num_tokens", batch_num_tokens) if by_token else ("global_batch_size", global_batch_size)
    if count is None and dp_size > 1 and mode != "token-sum":
        raise ValueError(f"{name}: got None with dp_size={dp_size}, want the number in all ranks' batches")
    rows: float | Tensor = (mask.sum(-1) > 0).sum().clamp(min=1) if global_batch_size is None else global_batch_size
    if mode == "token-mean":
        return False, batch_num_tokens, dp_size
    if mode == "token-sum":
        return False, 1.0, dp_size
    if mode == "seq-mean-token-mean":
        return True, global_batch_size, dp_size
    if mode == "seq-mean-token-sum":
        return False, rows, dp_size
    if mode == "seq-mean-token-sum-norm":
        return False, rows * (mask.size(-1) if loss_scale_factor is None else loss_scale_factor), dp_size
    raise ValueError(
        f"loss_agg_mode: got {mode!r}, want token-mean, token-sum, seq-mean-token-mean, seq-mean-token-sum or "
        "seq-mean-token-sum-norm"
    )


# What stands where verl has its own ------------------------------------------------------------------------------

_OURS: dict[str, Callable[..., Any]] = {
    "verl.utils.kernel.linear_cross_entropy.linear_cross_entropy": linear_cross_entropy,
    "verl.utils.torch_functional.logprobs_from_logits": logprobs_from_logits,
    "verl.utils.torch_functional.entropy_from_logits": entropy_from_logits,
}


def _attribute(path: str) -> Any:
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


_THEIRS = {path: _attribute(path) for path in _OURS}
_THEIR_FORWARD = FusedLinearForPPO.forward


def patch_verl() -> None:
    """Put our functions where verl has its own, in every module of verl that has imported them already too."""
    for path, function in _OURS.items():
        _swap(_THEIRS[path], function)
    FusedLinearForPPO.forward = fused_linear_forward


def unpatch_verl() -> None:
    """Give verl its own functions back; the policy loss stays registered."""
    for path, function in _OURS.items():
        _swap(function, _THEIRS[path])
    FusedLinearForPPO.forward = _THEIR_FORWARD


def _swap(before: Any, after: Any) -> None:
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] == "verl":
            for key in [key for key, value in vars(module).items() if value is before]:
                setattr(module, key, after)


patch_verl()
register_policy_loss("grpo_fast")(policy_loss)

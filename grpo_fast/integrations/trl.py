"""TRL: a ``GRPOTrainer`` whose loss is ``linear_grpo_loss``, and our log-probs in its other trainers."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from grpo_fast.backend import check_impl
from grpo_fast.config import CLIPPED_LOSSES, GRPOLossConfig
from grpo_fast.integrations import WORKSPACE_BYTES
from grpo_fast.integrations._versions import require
from grpo_fast.ops._loss_batch import GRPOLossOutput
from grpo_fast.ops.linear_grpo_loss import linear_grpo_loss
from grpo_fast.ops.linear_selective_log_softmax import linear_selective_log_softmax

require("trl", oldest="1.16", below="1.17")

from accelerate.utils import is_peft_model  # noqa: E402
from transformers import PreTrainedModel  # noqa: E402
from trl import GRPOConfig, GRPOTrainer  # noqa: E402

from grpo_fast.integrations._causal_lm import (  # noqa: E402
    Head,
    as_autocast,
    check_head,
    head_of,
    run_backbone,
)
from grpo_fast.integrations._trl_functions import log_probs_by, patch_trl, unpatch_trl  # noqa: E402

__all__ = ["FastGRPOTrainer", "loss_config", "patch_trl", "unpatch_trl"]

# What becomes of the states that predict the completion, and of the head, inside the model's forward.
_Objective = Callable[[Tensor, Head], Any]


class FastGRPOTrainer(GRPOTrainer):
    """``trl.GRPOTrainer``, its loss in one sweep from hidden states and the head: no logits, exact log-probs.

    Arguments, data, generation, rewards, metrics and checkpoints are TRL's. So are the options: of ``GRPOConfig``,
    all are honoured but those below.

    Args:
        impl: As in ``linear_grpo_loss``.

    Raises:
        ValueError: For an ``impl`` that is no implementation's name; for a vision-language model; for a head that is
            more than a ``torch.nn.Linear`` (an adapter or a quantization of lm_head); for a combination that TRL
            passes over, such as ``delta`` with a loss type that does not clip.
    """

    entropy_coef: float
    _entropy_window_stats: Tensor | None

    def __init__(self, *args: Any, impl: str | None = None, **kwargs: Any) -> None:
        check_impl(impl)
        super().__init__(*args, **kwargs)
        if self._is_vlm:
            raise ValueError("processing_class: got a processor, want a tokenizer (vision-language is not supported)")
        self._impl = impl
        self._loss_config = loss_config(self.args)
        model = self.model.get_base_model() if is_peft_model(self.model) else self.model
        check_head(model)
        _accept_objective(model)

    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> Any:
        with log_probs_by(self._impl):  # so that a ratio is 1 where nothing has changed
            return super()._get_per_token_logps_and_entropies(*args, **kwargs)

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        mode = "train" if self.model.training else "eval"
        accumulation = self.current_gradient_accumulation_steps if mode == "train" else 1
        mask = inputs["completion_mask"]
        if "tool_mask" in inputs:
            mask = mask * inputs["tool_mask"]
        coef = self._applied_entropy_coef()
        scale = self._loss_scale(mode, accumulation)
        config = replace(self._loss_config, entropy_coef=coef / (accumulation * scale))

        def objective(hidden: Tensor, head: Head) -> tuple[GRPOLossOutput, Tensor | None]:
            entropy_mask = self._entropy_mask(hidden, head, inputs["completion_ids"], mask)
            out = linear_grpo_loss(
                hidden,
                head.weight,
                inputs["completion_ids"],
                completion_mask=mask,
                advantages=inputs["advantages"],
                old_logps=inputs.get("old_per_token_logps"),
                ref_logps=inputs.get("ref_per_token_logps"),
                sampling_logps=inputs.get("sampling_per_token_logps"),
                importance_sampling_ratio=inputs.get("importance_sampling_ratio"),
                entropy_mask=entropy_mask,
                num_items_in_batch=inputs["num_items_in_batch"] if config.divides_by_items else None,
                temperature=self.temperature,
                config=config,
                workspace_bytes=WORKSPACE_BYTES,
                impl=self._impl,
                **head.options,
            )
            return out, entropy_mask

        (out, entropy_mask), aux_loss = self._forward_to(objective, model, inputs)
        loss: Tensor = out.loss * scale
        if self._entropy_bonus_enabled:
            policy_loss = out.metrics["policy_loss"] * (scale if config.divides_by_items else 1.0)
            self._metrics[mode]["policy_loss"].append(self.accelerator.gather(policy_loss).nanmean().item())
            if mode == "train":
                self._control_entropy(out.entropy, mask if entropy_mask is None else mask * entropy_mask)
        if aux_loss is not None:
            loss = loss + self.router_aux_loss_coef * aux_loss / accumulation
            aux_losses = self.accelerator.gather_for_metrics(aux_loss.detach())
            self._metrics[mode]["aux_loss"].append(aux_losses.mean().item())
        self._record(mode, out, inputs["advantages"])
        return loss

    def _forward_to(self, objective: _Objective, model: Any, inputs: dict[str, Any]) -> Any:
        """(what ``objective`` makes of the completion's states, load-balancing loss), by way of the wrapped model."""
        length = inputs["completion_ids"].size(1)

        def of_completion(hidden: Tensor, head: Head) -> Any:
            hidden = hidden[:, -length - 1 : -1].to(head.weight.device)
            if not self.args.cast_lm_head_to_fp32:  # TRL leaves autocast out there
                hidden, head = as_autocast(hidden), head._replace(weight=as_autocast(head.weight))
            return objective(hidden, head)

        # A function, since FSDP rounds the floating point tensors among a model's arguments.
        with self.accelerator.autocast():
            return model(
                input_ids=torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1),
                attention_mask=torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1),
                output_router_logits=True if self.aux_loss_enabled else None,
                objective=of_completion,
            )

    def _entropy_mask(self, hidden: Tensor, head: Head, ids: Tensor, mask: Tensor) -> Tensor | None:
        """The tokens of high entropy, by a quantile over all ranks; it has to be known before the loss."""
        if self.top_entropy_quantile == 1.0:
            return None
        with torch.no_grad():
            _, entropy = linear_selective_log_softmax(
                hidden,
                head.weight,
                ids,
                mask=mask,
                temperature=self.temperature,
                return_entropy=True,
                workspace_bytes=WORKSPACE_BYTES,
                impl=self._impl,
                **head.options,
            )
        chosen: Tensor = self.get_high_entropy_mask(entropy, mask, 1 - self.top_entropy_quantile)
        return chosen

    def _loss_scale(self, mode: str, accumulation: int) -> float:
        """What the loss of one micro-batch is multiplied by, for their sum over an optimizer step to be TRL's."""
        if not self._loss_config.divides_by_items:
            return 1 / accumulation
        # The items are those of the whole generation batch; gradients are averaged over processes.
        steps = self.args.steps_per_generation / accumulation if mode == "train" else 1.0
        return float(self.accelerator.num_processes * steps)

    def _applied_entropy_coef(self) -> float:
        if self.use_adaptive_entropy and self._last_world_entropy > self.args.entropy_target:
            return 0.0
        return float(self.entropy_coef)

    def _control_entropy(self, entropy: Tensor, mask: Tensor) -> None:
        """The controller of Skywork-OR1 (arXiv 2505.22312), over the tokens of one optimizer step on all ranks."""
        if self.use_adaptive_entropy:
            totals = torch.stack([(entropy * mask).sum(), mask.sum()])
            before = self._entropy_window_stats
            self._entropy_window_stats = totals if before is None else before + totals
            if self.accelerator.sync_gradients:
                total, count = self.accelerator.reduce(self._entropy_window_stats, reduction="sum").tolist()
                self._last_world_entropy = total / max(count, 1.0)
                self._entropy_window_stats = None
                low = self._last_world_entropy <= self.args.entropy_target
                moved = self.entropy_coef + (self.args.entropy_coef_delta if low else -self.args.entropy_coef_delta)
                bounds = self.args.entropy_coef_min, self.args.entropy_coef_max
                self.entropy_coef = min(moved, bounds[1]) if low else max(moved, bounds[0])
        if self.accelerator.sync_gradients:
            self._metrics["train"]["entropy_coef"].append(self.entropy_coef)

    def _record(self, mode: str, out: GRPOLossOutput, advantages: Tensor) -> None:
        """TRL's metrics of the loss: means over all ranks' tokens (or sequences, where there is one value each)."""
        tokens, sequences = out.metrics["num_active_tokens"], advantages.new_tensor(float(advantages.size(0)))
        one_a_sequence = advantages.dim() == 1 or advantages.size(1) == 1
        clipped = sequences if one_a_sequence and self.importance_sampling_level == "sequence" else tokens
        weights = {"entropy": tokens}
        if self.beta != 0.0:
            weights["kl"] = tokens
        if self.loss_type in CLIPPED_LOSSES:
            weights |= {f"clip_ratio/{name}_mean": clipped for name in ("low", "high", "region")}
        elif self.loss_type == "cispo":
            weights["cispo_clip_ratio"] = clipped
        elif self.loss_type == "vespo":
            weights["vespo/phi_seq_mean"] = sequences if one_a_sequence else tokens
        sums = torch.stack([x for name, weight in weights.items() for x in (out.metrics[name] * weight, weight)])
        totals = self.accelerator.reduce(sums, reduction="sum").tolist()
        for name, total, weight in zip(weights, totals[::2], totals[1::2], strict=True):
            self._metrics[mode][name].append(total / max(weight, 1.0))
        if self.loss_type in CLIPPED_LOSSES:
            extremes = torch.stack([out.metrics["clip_ratio/low_min"], -out.metrics["clip_ratio/high_max"]])
            smallest = self.accelerator.gather(extremes.unsqueeze(0)).nan_to_num(torch.inf).amin(0)
            low, high = smallest.masked_fill(smallest.isinf(), torch.nan).tolist()
            self._metrics[mode]["clip_ratio/low_min"].append(low)
            self._metrics[mode]["clip_ratio/high_max"].append(-high)


def loss_config(args: GRPOConfig) -> GRPOLossConfig:
    """The options of the loss among those of the trainer; the entropy bonus, which may change, is left at 0."""
    return GRPOLossConfig(
        loss_type=args.loss_type,
        importance_sampling_level=args.importance_sampling_level,
        epsilon_low=args.epsilon,
        epsilon_high=args.epsilon_high,
        delta=args.delta,
        beta=args.beta,
        use_bias_correction_kl=args.use_bias_correction_kl,
        sapo_temperature_pos=args.sapo_temperature_pos,
        sapo_temperature_neg=args.sapo_temperature_neg,
        vespo_k_pos=args.vespo_k_pos,
        vespo_lambda_pos=args.vespo_lambda_pos,
        vespo_k_neg=args.vespo_k_neg,
        vespo_lambda_neg=args.vespo_lambda_neg,
        off_policy_mask_threshold=args.off_policy_mask_threshold,
        max_completion_length=args.max_completion_length,
    )


def _accept_objective(model: PreTrainedModel) -> None:
    """Let the model's forward take ``objective``, which gets its hidden states and head, in place of logits.

    Inside the forward, as TRL's own fused head: there FSDP and ZeRO-3 have the parameters, and DDP waits for what it
    returns.
    """
    original = model.forward

    @functools.wraps(type(model).forward)
    def forward(self: PreTrainedModel, *args: Any, objective: _Objective | None = None, **kwargs: Any) -> Any:
        if objective is None:
            return original(*args, **kwargs)
        inputs = {name: value for name, value in kwargs.items() if value is not None}  # PEFT names them all
        outputs, aux_loss = run_backbone(self, **inputs, use_cache=False)
        return objective(outputs.last_hidden_state, head_of(self)), aux_loss

    model.forward = types.MethodType(forward, model)

"""A causal language model of transformers as hidden states and the head that turns them into logits."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial
from transformers import PreTrainedModel

from grpo_fast.ops.linear_selective_log_softmax import linear_selective_log_softmax


class Head(NamedTuple):
    """What turns hidden states (..., H) into logits: ``softcap tanh(scale (hidden weight^T + bias) / softcap)``.

    Attributes:
        weight: (V, H).
        bias: (V,), or None.
        logit_scale: The factor, 1 for most architectures.
        softcap: The bound, None for most.
    """

    weight: Tensor
    bias: Tensor | None
    logit_scale: float
    softcap: float | None

    @property
    def options(self) -> dict[str, Any]:
        """All but the weight, as arguments of the linear ops."""
        return dict(bias=self.bias, logit_scale=self.logit_scale, softcap=self.softcap)


def head_of(model: PreTrainedModel) -> Head:
    """The model's head with its parameters whole. To be called in the model's forward, where FSDP has them so."""
    linear = model.get_output_embeddings()
    return Head(whole(linear.weight), whole_bias(linear.bias), *_logit_transform(model))


def check_head(model: PreTrainedModel) -> None:
    """Check that ``head_of`` has all there is between hidden states and logits, by a few tokens through the model.

    Raises:
        ValueError: It has not, or the head is more than a linear layer; the message names the model.
    """
    name = type(model).__name__
    linear = model.get_output_embeddings()
    if type(linear) is not nn.Linear:
        raise ValueError(
            f"model: the head of {name} is a {type(linear).__module__}.{type(linear).__qualname__}, want a "
            "torch.nn.Linear (an adapter or a quantization of lm_head is not supported)"
        )
    if linear.weight.is_meta or hasattr(linear.weight, "ds_id"):  # no weights to compute with, before it is wrapped
        return
    training = model.training
    model.eval()
    with torch.no_grad():
        ids = torch.arange(min(8, linear.weight.size(0)), device=model.device).unsqueeze(0)
        logits = model(input_ids=ids, use_cache=False).logits
        hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
        head = head_of(model)
        found = linear_selective_log_softmax(
            hidden.to(head.weight.device),
            head.weight,
            ids.to(head.weight.device),
            return_entropy=True,
            impl="torch",
            **head.options,
        )
    model.train(training)
    log_p = logits.float().log_softmax(-1)
    want = log_p.gather(-1, ids.to(log_p.device).unsqueeze(-1)).squeeze(-1), -(log_p.exp() * log_p).sum(-1)
    tolerance = 1e-3 if logits.dtype == torch.float32 else 0.2  # the model's own logits are rounded, by 2^-9 of them
    if not all(torch.allclose(x.to(y), y, atol=tolerance) for x, y in zip(found, want, strict=True)):
        raise ValueError(
            f"model: {name} has more than a scale and a softcap between its head and the logits, want at most these"
        )


def run_backbone(model: PreTrainedModel, **inputs: Any) -> tuple[Any, Tensor | None]:
    """The output of the model below the head, and a mixture of experts' load-balancing loss where asked for."""
    if getattr(model.config.get_text_config(), "output_router_logits", False):
        inputs.setdefault("output_router_logits", True)
    outputs = model.base_model(**inputs, return_dict=True)
    if not inputs.get("output_router_logits"):
        return outputs, None
    return outputs, _load_balancing_loss(model, outputs.router_logits, inputs.get("attention_mask"))


def as_autocast(x: Tensor) -> Tensor:
    """``x`` in the precision that autocast gives a linear layer."""
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x


def _load_balancing_loss(model: PreTrainedModel, router_logits: Any, attention_mask: Tensor | None) -> Tensor:
    """What the model's own forward computes: each architecture has the function beside it, and its sizes."""
    function = getattr(sys.modules[type(model).__module__], "load_balancing_loss_func", None)
    sizes = [getattr(model, name, None) for name in ("num_experts", "num_experts_per_tok")]
    if function is None or None in sizes:
        raise ValueError(
            f"output_router_logits: the load-balancing loss of {type(model).__name__} is not known, want False, or a "
            "model with num_experts, num_experts_per_tok and load_balancing_loss_func in its module"
        )
    loss: Tensor = function(router_logits, *sizes, attention_mask)
    return loss


def _logit_transform(model: PreTrainedModel) -> tuple[float, float | None]:
    """(scale, softcap), under the names that architectures have for them."""
    config = model.config.get_text_config()
    softcap = getattr(config, "final_logit_softcapping", None)
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        if getattr(config, name, None) is not None:
            return getattr(config, name), softcap
    divisor = getattr(config, "logits_scaling", None) or 1.0
    return (divisor if config.model_type == "hyperclovax" else 1.0 / divisor), softcap


def whole(parameter: Any) -> Tensor:
    """A parameter that may lie in shards, gathered; its gradient finds the way back."""
    if isinstance(parameter, DTensor):
        # Every rank has the gradient of its own batch, and FSDP averages over ranks.
        placements = [Partial("avg")] * parameter.device_mesh.ndim
        return parameter.full_tensor(grad_placements=placements)
    if not hasattr(parameter, "ds_id"):
        return cast(Tensor, parameter)
    from deepspeed.runtime.zero.partition_parameters import GatheredParameters, ZeroParamStatus

    # Tied to an embedding in use, it is there already, and is not this function's to partition again.
    there = parameter.ds_status == ZeroParamStatus.AVAILABLE
    with nullcontext() if there else GatheredParameters([parameter]):
        return cast(Tensor, parameter.clone())  # the backward may need it, when the parameter is in shards again


def whole_bias(bias: Any) -> Tensor | None:
    """The same of a bias, which a head may be without."""
    return None if bias is None else whole(bias)

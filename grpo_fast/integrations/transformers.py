"""Log-probs of labels, without logits, from any causal language model of transformers."""

from __future__ import annotations

import functools
import inspect
import types
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from grpo_fast.integrations import WORKSPACE_BYTES
from grpo_fast.integrations._versions import require
from grpo_fast.ops.linear_selective_log_softmax import linear_selective_log_softmax

require("transformers", oldest="5.0", below="6.0")

from transformers import PreTrainedModel  # noqa: E402
from transformers.modeling_outputs import CausalLMOutputWithPast  # noqa: E402

from grpo_fast.integrations._causal_lm import as_autocast, check_head, head_of, run_backbone  # noqa: E402

_UNPATCHED = "_grpo_fast_unpatched_forward"
_MISSING = object()


@dataclass
class CausalLMOutputWithLogps(CausalLMOutputWithPast):
    """What a patched model returns for labels; ``logits`` is None.

    Attributes:
        loss: Scalar, minus the mean of ``logps`` over the labels that count (their sum over ``num_items_in_batch``,
            if given), plus the model's ``router_aux_loss_coef`` times ``aux_loss`` where there is one.
        logps: (B, T - 1) float32, the log-prob of each next label, or (B, T) of ``shift_labels``; 0 where it is -100.
        entropy: As ``logps``: the entropy in nats of the distribution that predicts the label.
        aux_loss: Scalar, the load-balancing loss of a mixture of experts, with ``output_router_logits``.
        hidden_states, attentions: As in ``CausalLMOutputWithPast``.
    """

    logps: Tensor | None = None
    entropy: Tensor | None = None
    aux_loss: Tensor | None = None


def patch_causal_lm(model: PreTrainedModel, *, temperature: float = 1.0, impl: str | None = None) -> None:
    """Let ``model(..., labels=...)`` return a ``CausalLMOutputWithLogps``: its logits are never whole in memory.

    For this instance only, and without labels as before, so that generation does not change. Before PEFT, FSDP, DDP
    or torch.compile wrap the model. Patching again changes the options.

    Args:
        model: A causal language model whose head is a plain ``torch.nn.Linear``, on its device.
        temperature: What the logits are divided by.
        impl: As in ``linear_selective_log_softmax``.

    Raises:
        ValueError: The head is something else; at a call, for ``logits_to_keep``, ``return_dict=False`` or
            ``use_cache=True`` beside labels, and for a load-balancing loss that is not known.
    """
    unpatch_causal_lm(model)
    check_head(model)
    original = model.forward
    signature = inspect.signature(original)

    @functools.wraps(type(model).forward)  # generate() reads the signature
    def forward(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        inputs = _by_name(signature, args, kwargs)
        labels, shifted = inputs.pop("labels", None), inputs.pop("shift_labels", None)
        if labels is None and shifted is None:
            return original(*args, **kwargs)
        for name, default in (("logits_to_keep", 0), ("return_dict", True), ("use_cache", False)):
            value = inputs.pop(name, None)
            if value is not None and value is not default:
                raise ValueError(f"{name}: got {value!r} beside labels, want None or {default}")
        num_items = inputs.pop("num_items_in_batch", None)
        outputs, aux_loss = run_backbone(self, **inputs, use_cache=False)
        hidden = outputs.last_hidden_state
        if shifted is None:
            hidden, shifted = hidden[:, :-1], labels[:, 1:]
        head = head_of(self)
        index = shifted.to(head.weight.device)
        mask = index != -100
        logps, entropy = linear_selective_log_softmax(
            as_autocast(hidden.to(head.weight.device)),
            as_autocast(head.weight),
            index,
            mask=mask,
            temperature=temperature,
            return_entropy=True,
            workspace_bytes=WORKSPACE_BYTES,
            impl=impl,
            **head.options,
        )
        loss = -logps.sum() / (mask.sum().clamp(min=1) if num_items is None else num_items)
        if aux_loss is not None:
            loss = loss + self.router_aux_loss_coef * aux_loss
        return CausalLMOutputWithLogps(
            loss=loss,
            logps=logps,
            entropy=entropy,
            aux_loss=aux_loss,
            hidden_states=outputs.get("hidden_states"),
            attentions=outputs.get("attentions"),
        )

    setattr(model, _UNPATCHED, vars(model).get("forward", _MISSING))
    model.forward = types.MethodType(forward, model)


def is_patched(model: PreTrainedModel) -> bool:
    """Whether ``patch_causal_lm`` has patched ``model``."""
    return hasattr(model, _UNPATCHED)


def unpatch_causal_lm(model: PreTrainedModel) -> None:
    """Give ``model`` the forward back that it had before ``patch_causal_lm``; nothing, if it is not patched."""
    if not is_patched(model):
        return
    if getattr(model, _UNPATCHED) is _MISSING:
        del model.forward
    else:
        model.forward = getattr(model, _UNPATCHED)
    delattr(model, _UNPATCHED)


def _by_name(signature: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call as keywords, those that were given by position too."""
    inputs = dict(signature.bind(*args).arguments)
    for name, parameter in signature.parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            inputs.pop(name, None)
    return inputs | kwargs

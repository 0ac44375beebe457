"""Patched causal language models against the models' own logits and loss."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from conftest import rand

pytest.importorskip("transformers")

from transformers import AutoConfig, AutoModelForCausalLM

from grpo_fast.integrations.transformers import patch_causal_lm, unpatch_causal_lm

B, T, V = 3, 9, 37

#: model_type -> what its config needs beside the common sizes.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": dict(tie_word_embeddings=True),
    "qwen3": dict(head_dim=8),
    "mistral": {},
    "gemma": dict(head_dim=8),
    "gemma2": dict(head_dim=8, final_logit_softcapping=0.3),
    "gemma3_text": dict(head_dim=8, final_logit_softcapping=0.3),
    "phi": {},
    "gpt_neox": {},
    "cohere": dict(logit_scale=0.2),
    "granite": dict(logits_scaling=3.0),
    "mixtral": dict(num_local_experts=4, output_router_logits=True),
    "qwen3_moe": dict(
        num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, head_dim=8, output_router_logits=True
    ),
}


def make_model(architecture: str) -> Any:
    config = AutoConfig.for_model(
        architecture,
        vocab_size=V,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=1,
        **ARCHITECTURES[architecture],
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    head = model.get_output_embeddings()
    with torch.no_grad():
        head.weight.copy_(rand(*head.weight.shape, seed=1))
        if head.bias is not None:
            head.bias.copy_(rand(V, seed=2))
    return model


def make_inputs() -> dict[str, torch.Tensor]:
    ids = torch.randint(2, V, (B, T), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, -3:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :3] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_architectures(architecture: str) -> None:
    """Loss and gradients are the model's own; log-probs and entropy those of its logits."""
    model, inputs = make_model(architecture), make_inputs()
    parameters = list(model.parameters())
    want = model(**inputs)
    want_grads = torch.autograd.grad(want.loss, parameters, allow_unused=True)
    patch_causal_lm(model, temperature=1.0)
    out = model(**inputs)
    torch.testing.assert_close(out.loss, want.loss, rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(torch.autograd.grad(out.loss, parameters, allow_unused=True), want_grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)

    assert out.logits is None
    mask, index = inputs["labels"][:, 1:] != -100, inputs["labels"][:, 1:].clamp(min=0)
    log_p = want.logits[:, :-1].log_softmax(-1)
    logps = log_p.gather(-1, index[..., None])[..., 0]
    torch.testing.assert_close(out.logps, logps * mask, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out.entropy, -(log_p.exp() * log_p).sum(-1) * mask, rtol=1e-5, atol=1e-5)
    if "output_router_logits" in ARCHITECTURES[architecture]:
        torch.testing.assert_close(out.aux_loss, want.aux_loss)
        assert out.aux_loss > 0.5
    else:
        assert out.aux_loss is None


def test_ways_to_call() -> None:
    model, inputs = make_model("llama"), make_inputs()
    logits = model(inputs["input_ids"], inputs["attention_mask"]).logits
    patch_causal_lm(model, temperature=0.5)
    out = model(**inputs)
    mask = inputs["labels"][:, 1:] != -100
    want = (logits[:, :-1] / 0.5).log_softmax(-1).gather(-1, inputs["input_ids"][:, 1:, None])[..., 0] * mask
    torch.testing.assert_close(out.logps, want, rtol=1e-5, atol=1e-5)
    by_position = model(inputs["input_ids"], inputs["attention_mask"], labels=inputs["labels"], num_items_in_batch=7)
    torch.testing.assert_close(by_position.loss, -want.sum() / 7)
    shifted = torch.nn.functional.pad(inputs["labels"][:, 1:], (0, 1), value=-100)
    unlabelled = {name: x for name, x in inputs.items() if name != "labels"}
    torch.testing.assert_close(model(**unlabelled, shift_labels=shifted).logps[:, :-1], want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model(**unlabelled).logits, logits)
    assert model(**inputs, output_hidden_states=True).hidden_states is not None


def test_autocast_decides_the_precision_of_the_product() -> None:
    model, inputs = make_model("llama"), make_inputs()
    patch_causal_lm(model)
    exact = model(**inputs).logps
    with torch.autocast("cpu", torch.bfloat16):
        rounded = model(**inputs)
    rounded.loss.backward()
    assert 1e-4 < (rounded.logps - exact).abs().max() < 0.2
    assert model.lm_head.weight.grad.dtype == torch.float32


def test_unpatching_restores() -> None:
    model = make_model("llama")
    plain = vars(model).copy()
    for temperature in (0.5, 1.0):
        patch_causal_lm(model, temperature=temperature)
    assert vars(model).keys() != plain.keys()
    for _ in range(2):
        unpatch_causal_lm(model)
    assert vars(model).keys() == plain.keys()
    assert model(**make_inputs()).logits is not None


def test_generation_is_unchanged() -> None:
    model, ids = make_model("qwen2"), make_inputs()["input_ids"]
    want = model.generate(ids, max_new_tokens=5, do_sample=False)
    patch_causal_lm(model)
    assert torch.equal(model.generate(ids, max_new_tokens=5, do_sample=False), want)


@pytest.mark.parametrize("name", ["logits_to_keep", "return_dict", "use_cache"])
def test_refused_beside_labels(name: str) -> None:
    model = make_model("llama")
    patch_causal_lm(model)
    value = {"logits_to_keep": 3, "return_dict": False, "use_cache": True}[name]
    with pytest.raises(ValueError, match=f"{name}: got {value} beside labels"):
        model(**make_inputs(), **{name: value})


def even_out(module: Any, inputs: Any, logits: torch.Tensor) -> torch.Tensor:
    """Logits whose log-probs at the first eight words stay, and only the entropy changes."""
    rest = logits[..., 8:]
    same = rest.logsumexp(-1, keepdim=True) - math.log(rest.size(-1))
    return torch.cat([logits[..., :8], same.expand_as(rest)], -1)


def test_refused_models() -> None:
    model = make_model("llama")
    model.lm_head.register_forward_hook(lambda module, inputs, output: output * 2)
    with pytest.raises(ValueError, match="LlamaForCausalLM has more than a scale and a softcap"):
        patch_causal_lm(model)
    model = make_model("llama")
    model.lm_head.register_forward_hook(even_out)
    with pytest.raises(ValueError, match="LlamaForCausalLM has more than a scale and a softcap"):
        patch_causal_lm(model)
    model.set_output_embeddings(torch.nn.Sequential(model.lm_head))
    with pytest.raises(ValueError, match=r"the head of LlamaForCausalLM is a torch\.nn.*Sequential"):
        patch_causal_lm(model)


def test_an_unknown_load_balancing_loss_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.mixtral import modeling_mixtral

    model = make_model("mixtral")
    patch_causal_lm(model)
    monkeypatch.delattr(modeling_mixtral, "load_balancing_loss_func")
    with pytest.raises(ValueError, match="output_router_logits: the load-balancing loss of MixtralForCausalLM"):
        model(**make_inputs())

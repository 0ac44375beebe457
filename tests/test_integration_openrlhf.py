"""An actor and a policy loss of OpenRLHF with grpo_fast inside, against OpenRLHF's own."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import itertools
import runpy
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("openrlhf", reason="openrlhf is not installed")
pytest.importorskip("deepspeed", reason="OpenRLHF imports deepspeed", exc_type=ImportError)


def _unpad(x: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, ...]:
    indices = mask.flatten().nonzero().flatten()
    lengths = mask.sum(-1)
    ends = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
    return x.flatten(0, 1)[indices], indices, ends, lengths.max(), lengths


def _pad(x: torch.Tensor, indices: torch.Tensor, batch: int, length: int) -> torch.Tensor:
    return x.new_zeros(batch * length, *x.shape[1:]).index_copy(0, indices, x).view(batch, length, *x.shape[1:])


try:
    import flash_attn  # noqa: F401
except ImportError:  # there is none for a CPU; OpenRLHF has these from it
    for name in ("flash_attn", "flash_attn.bert_padding", "flash_attn.utils", "flash_attn.utils.distributed"):
        sys.modules[name] = types.ModuleType(name)
        sys.modules[name].__spec__ = importlib.machinery.ModuleSpec(name, None)
    padding = sys.modules["flash_attn.bert_padding"]
    padding.unpad_input, padding.pad_input = _unpad, _pad
    padding.index_first_axis = lambda x, indices: x[indices]
    padding.rearrange = lambda x, _: x.flatten(0, 1)
    sys.modules["flash_attn.utils.distributed"].all_gather = None
    pytest.importorskip("openrlhf.models", exc_type=ImportError)  # the reason names what is missing
    for name in [name for name in sys.modules if name.partition(".")[0] == "flash_attn"]:
        del sys.modules[name]  # nobody else may find them

from openrlhf.models import Actor, PolicyLoss  # noqa: E402
from openrlhf.models import actor as actor_module  # noqa: E402
from transformers import (  # noqa: E402
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

from grpo_fast.integrations import openrlhf as ours  # noqa: E402

B, T, A, V = 4, 9, 5, 23
LENGTHS = torch.tensor([5, 2, 4, 0])
SIZES = dict(vocab_size=V, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
SIZES |= dict(num_key_value_heads=2)
UNDROPPED = dict(attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0)


def normal(*shape: int, seed: int, scale: float = 1.0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


@pytest.fixture(autouse=True)
def unpatched(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(actor_module, "compute_entropy", actor_module.compute_entropy._torchdynamo_orig_callable)
    yield
    ours.unpatch_openrlhf()


#: GPT-2 has absolute positions; of the others only differences matter, which padding on the left leaves alone.
MODELS: dict[str, Any] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=V, n_embd=16, n_layer=1, n_head=2, **UNDROPPED)),
    "mixtral": lambda: MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=4, output_router_logits=True)),
}


def make_actor(packing: bool = False, model: str = "llama") -> Actor:
    torch.manual_seed(0)
    actor = Actor(MODELS[model](), temperature=0.7)
    with torch.no_grad():
        for p in actor.parameters():
            p.mul_(5)
    actor.packing_samples, actor.model.config.use_cache = packing, False  # as for a model that it loads itself
    return actor.eval()


def inputs() -> dict[str, torch.Tensor]:
    """Prompts padded on the left, completions on the right."""
    ids = torch.randint(0, V, (B, T), generator=torch.Generator().manual_seed(0))
    action_mask = (torch.arange(A) < LENGTHS[:, None]).long()
    prompt = (torch.arange(T - A) >= torch.tensor([0, 1, 2, 0])[:, None]).long()
    return {"sequences": ids, "attention_mask": torch.cat([prompt, action_mask], 1), "action_mask": action_mask}


def results(actor: Actor, x: dict[str, Any], **options: Any) -> list[torch.Tensor]:
    """Log-probs and entropy where they count, and the gradients of both."""
    log_probs, output = actor(**x, return_output=True, return_entropy=True, **options)
    counts = x["action_mask"] if "action_mask" in x else x["attention_mask"][:, 1:]
    entropy = output.entropy[:, -counts.size(1) :] * counts
    log_probs = log_probs * counts
    weights = normal(*counts.shape, seed=1)
    loss = (log_probs * weights).sum() + (entropy * weights.flip(0)).sum()
    if "aux_loss" in output:
        loss = loss + output.aux_loss
    return [log_probs, entropy, *torch.autograd.grad(loss, list(actor.parameters()), allow_unused=True)]


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("masked", [False, True], ids=["all tokens", "actions"])
def test_actor(packing: bool, masked: bool, model: str) -> None:
    x = inputs()
    options: dict[str, Any] = {}
    if not masked:
        del x["action_mask"]
        options["return_logprobs"] = True
    want = results(make_actor(packing, model), x, **options)
    ours.patch_openrlhf()
    actor = make_actor(packing, model)
    found = results(actor, x, **options)
    assert want[0].abs().max() > 1
    for mine, theirs in zip(found, want, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)
    alone = actor(**x, **options)
    torch.testing.assert_close(alone * (x["action_mask"] if masked else x["attention_mask"][:, 1:]), found[0])
    if masked:
        assert (alone[x["action_mask"] == 0] == 0).all()
    output = actor(**x, return_output=True, **options)[1]
    assert output.logits is None
    assert output.entropy is None


def test_only_actions_are_projected(monkeypatch: pytest.MonkeyPatch) -> None:
    ours.patch_openrlhf()
    functions = ours.patch_causal_lm.__globals__
    op, masks = functions["linear_selective_log_softmax"], []

    def counted(*args: Any, mask: torch.Tensor, **kwargs: Any) -> Any:
        masks.append(mask)
        return op(*args, mask=mask, **kwargs)

    monkeypatch.setitem(functions, "linear_selective_log_softmax", counted)
    make_actor()(**inputs())
    assert [int(mask.sum()) for mask in masks] == [int(LENGTHS.sum())]


def test_lora() -> None:
    """Under PEFT, where the model was loaded before it is first called."""
    peft = pytest.importorskip("peft")
    found = []
    for patch in (lambda: None, ours.patch_openrlhf):
        patch()
        actor = make_actor()
        actor.model = peft.get_peft_model(actor.model, peft.LoraConfig(target_modules=["q_proj"], r=4))
        found.append(actor(**inputs()))
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-4)


def test_logits_are_as_before() -> None:
    x = inputs()
    del x["action_mask"]
    want = make_actor()(**x, return_output=True).logits
    ours.patch_openrlhf()
    actor = make_actor()
    torch.testing.assert_close(actor(**x, return_output=True).logits, want)
    actor(**inputs())
    torch.testing.assert_close(actor(**x, return_output=True).logits, want)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(ring_attn_group=object()), "ring_attn_group: got one, want None"),
        (dict(pixel_values=torch.zeros(1)), "mm_inputs: got a vision-language model"),
        (dict(return_entropy=True), "return_entropy: got True without return_output"),
    ],
    ids=lambda x: "-".join(x) if isinstance(x, dict) else "",
)
def test_refused_calls(options: dict[str, Any], message: str) -> None:
    ours.patch_openrlhf()
    with pytest.raises(ValueError, match=message):
        make_actor()(**inputs(), **options)


def test_a_head_that_is_more_than_linear_is_refused() -> None:
    ours.patch_openrlhf()
    actor = make_actor()
    actor.model.lm_head.register_forward_hook(lambda module, inputs, output: output * 2)
    with pytest.raises(ValueError, match="LlamaForCausalLM has more than a scale and a softcap"):
        actor(**inputs())


# The loss --------------------------------------------------------------------------------------------------------

CORRECTIONS = [
    dict(is_correction_level="off"),
    *(dict(is_correction_level=level, is_correction_threshold=[0.7, 1.4]) for level in ("token", "seq")),
    dict(is_correction_level="token", is_correction_mode="clip", is_correction_threshold=[0.7, 1.4]),
    *(
        dict(is_correction_level=level, is_correction_gating=gating, is_correction_threshold=[0.0, bound])
        for level, (gating, bound) in itertools.product(("token", "seq"), (("binary_kl", 0.01), ("tv", 0.04)))
    ),
]
GLOBAL = dict(dp_size=2, batch_num_tokens=31.0, global_batch_size=13.0)


@pytest.mark.parametrize("info", [{}, GLOBAL], ids=["local", "global"])
@pytest.mark.parametrize("token_level", [True, False], ids=["tokens", "sequences"])
@pytest.mark.parametrize("dual_clip", [None, 1.7])
@pytest.mark.parametrize("kind", ["ppo", "gspo"])
@pytest.mark.parametrize("correction", CORRECTIONS, ids=lambda x: "-".join(str(v) for v in x.values()))
def test_policy_loss(correction: Any, kind: str, dual_clip: float | None, token_level: bool, info: Any) -> None:
    loss_fn = PolicyLoss(0.2, 0.28, dual_clip, token_level, kind, **correction)
    # Of an empty sequence, OpenRLHF has no mean to hold against the thresholds.
    least = 1 if correction["is_correction_level"] == "seq" else 0
    mask = (torch.arange(A) < torch.tensor([5, 2, 4, least])[:, None]).long()
    old = -2 + normal(B, A, seed=0)
    moved = normal(B, A, seed=2)
    if kind == "ppo":
        moved[0, :2] = torch.tensor([30.0, -30.0])  # beyond where it is bounded
    found = []
    for function in (ours._THEIR_LOSS, ours.policy_loss_forward):
        log_probs = (old + moved).requires_grad_()
        outputs = function(
            loss_fn,
            log_probs,
            old,
            normal(B, A, seed=3),
            mask,
            old + normal(B, A, seed=4, scale=0.4),
            **info,
        )
        found.append((outputs[0], torch.autograd.grad(outputs[0], log_probs)[0], *outputs[1:]))
    for mine, theirs in zip(found[1], found[0], strict=True):
        if theirs is None:
            assert mine is None
        else:
            torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)
    assert found[0][2] > 0.1
    if correction["is_correction_level"] != "off" and kind == "ppo":
        assert 0 < found[0][5] < 1


def test_without_a_mask() -> None:
    values = [normal(B, A, seed=i) for i in range(3)]
    for mine, theirs in zip(ours.policy_loss_forward(PolicyLoss(), *values), PolicyLoss()(*values), strict=True):
        assert (mine is None and theirs is None) or torch.allclose(mine, theirs, atol=1e-6)


def test_refused_losses() -> None:
    values = [normal(B, A, seed=i) for i in range(3)]
    with pytest.raises(ValueError, match="policy_loss_type: got 'reinforce', want 'ppo' or 'gspo'"):
        ours.policy_loss_forward(PolicyLoss(policy_loss_type="reinforce"), *values)
    with pytest.raises(ValueError, match="rollout_log_probs: got None with is_correction_level='token'"):
        ours.policy_loss_forward(PolicyLoss(is_correction_level="token"), *values)


def test_patching_is_idempotent_and_undone() -> None:
    their_actor, their_loss = Actor.forward, PolicyLoss.forward
    for _ in range(2):
        ours.patch_openrlhf()
    assert (Actor.forward, PolicyLoss.forward) == (ours.actor_forward, ours.policy_loss_forward)
    for _ in range(2):
        ours.unpatch_openrlhf()
    assert (Actor.forward, PolicyLoss.forward) == (their_actor, their_loss)


def test_the_example_names_what_there_is() -> None:
    pytest.importorskip("ray")
    names = runpy.run_path(str(Path(__file__).parents[1] / "examples/openrlhf_ppo.py"))
    module, _, function = names["RUNTIME_ENV"]["worker_process_setup_hook"].rpartition(".")
    assert getattr(sys.modules[module], function) is ours.patch_openrlhf
    assert importlib.util.find_spec("openrlhf.cli.train_ppo_ray")

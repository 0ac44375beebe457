"""Our functions and policy loss in verl, against verl's own."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

core_algos = pytest.importorskip("verl.trainer.ppo.core_algos", reason="verl is not importable", exc_type=ImportError)

from transformers import LlamaConfig, LlamaForCausalLM  # noqa: E402
from verl.models.transformers import dense_common  # noqa: E402
from verl.utils import torch_functional  # noqa: E402
from verl.utils.experimental.torch_functional import FusedLinearForPPO  # noqa: E402
from verl.utils.kernel import linear_cross_entropy as kernel  # noqa: E402

from grpo_fast.integrations import verl as ours  # noqa: E402

B, T, V, H = 5, 7, 33, 8


def normal(*shape: int, seed: int, scale: float = 1.0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


def test_functions_of_logits() -> None:
    labels = torch.arange(B * T).view(B, T) % V
    results = []
    for entropy, logprobs in (
        (
            ours._THEIRS["verl.utils.torch_functional.entropy_from_logits"],
            torch_functional.logprobs_from_logits_naive,
        ),
        (ours.entropy_from_logits, ours.logprobs_from_logits),
    ):
        logits = normal(B, T, V, seed=0, scale=3.0).requires_grad_()
        outputs = entropy(logits), logprobs(logits, labels)
        loss = sum((x * normal(B, T, seed=1)).sum() for x in outputs)
        results.append([*outputs, torch.autograd.grad(loss, logits)[0]])
    for theirs, mine in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


def test_linear_cross_entropy() -> None:
    hidden, weight = normal(B, T, H, seed=0).requires_grad_(), normal(V, H, seed=1).requires_grad_()
    labels = torch.arange(B * T).view(B, T) % V
    one = SimpleNamespace(size=lambda: 1)  # what Megatron passes without tensor parallelism
    logps, entropy = ours.linear_cross_entropy(hidden, weight, labels, 0.7, "none", one)
    logits = (hidden @ weight.T / 0.7).view(-1, V)
    want = torch_functional.logprobs_from_logits_naive(logits, labels.view(-1))
    want_entropy = torch.distributions.Categorical(logits=logits).entropy()
    torch.testing.assert_close(logps, want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(entropy, want_entropy, rtol=1e-5, atol=1e-5)
    for got, expected in zip(
        torch.autograd.grad(logps.sum() + entropy.sum(), (hidden, weight)),
        torch.autograd.grad(want.sum() + want_entropy.sum(), (hidden, weight)),
        strict=True,
    ):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_fused_linear_for_ppo() -> None:
    """The fused forward of verl's torch and Liger backends: its own result before, ours after."""
    results = []
    for forward in (ours._THEIR_FORWARD, FusedLinearForPPO.forward):
        hidden, weight = normal(B, T, H, seed=0).requires_grad_(), normal(V, H, seed=1).requires_grad_()
        outputs = forward(FusedLinearForPPO(chunk_size=4), hidden, weight, torch.arange(B * T).view(B, T) % V, 0.7)
        loss = sum((x * normal(B, T, seed=2 + i)).sum() for i, x in enumerate(outputs))
        results.append([*outputs, *torch.autograd.grad(loss, (hidden, weight))])
    for theirs, mine in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_model_under_verl(backend: str) -> None:
    """verl's forward of a dense model, which shifts the labels and reads the head, against the model's own logits."""
    torch.manual_seed(0)
    sizes = dict(vocab_size=V, hidden_size=H, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=2))
    with torch.no_grad():
        model.lm_head.weight.mul_(20)
    ids = torch.randint(0, V, (B, T), generator=torch.Generator().manual_seed(0))
    forward = getattr(dense_common, f"forward_with_{backend}_backend")
    out = forward(model, input_ids=ids, temperature=0.7, return_dict=True)
    log_p = (model(ids).logits / 0.7).log_softmax(-1)
    want = log_p.gather(-1, ids.roll(-1, 1)[..., None])[..., 0]
    torch.testing.assert_close(out.log_probs.view(B, T), want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out.entropy.view(B, T), -(log_p.exp() * log_p).sum(-1), rtol=1e-5, atol=1e-5)
    grads = [torch.autograd.grad(x.sum(), list(model.parameters())) for x in (out.log_probs, want)]
    for mine, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(reduction="mean"), "reduction: got 'mean'"),
        (dict(dist_process_group=SimpleNamespace(size=lambda: 2)), "dist_process_group: got 2 ranks"),
        (dict(temperature=torch.ones(3)), "temperature: got Tensor"),
    ],
)
def test_what_linear_cross_entropy_refuses(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ours.linear_cross_entropy(normal(3, H, seed=0), normal(V, H, seed=1), torch.zeros(3, dtype=int), **options)


class ActorConfig(SimpleNamespace):
    def get(self, name: str, default: Any) -> Any:
        return getattr(self, name, default)


def batch() -> dict[str, torch.Tensor]:
    mask = (torch.arange(T) < torch.tensor([7, 3, 1, 0, 5])[:, None]).long()
    old = -2 + normal(B, T, seed=0)
    return {"old_log_prob": old, "advantages": normal(B, T, seed=1), "response_mask": mask}


GLOBAL = dict(dp_size=2, batch_num_tokens=61, global_batch_size=11, loss_scale_factor=9)
MODES = ["token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-sum-norm", "seq-mean-token-mean"]


@pytest.mark.parametrize("info", [{}, GLOBAL, {"loss_scale_factor": None}], ids=["local", "global", "none"])
@pytest.mark.parametrize("weights", [None, (B, T)], ids=["", "rollout weights"])
@pytest.mark.parametrize("options", [{}, {"clip_ratio_c": 1.7, "clip_ratio_high": 0.28}], ids=["", "clips"])
@pytest.mark.parametrize("mode", MODES)
def test_policy_loss(mode: str, options: dict[str, float], weights: tuple[int, int] | None, info: Any) -> None:
    """verl's vanilla loss: value, gradient and metrics, with ratios beyond every clip."""
    config = ActorConfig(
        **{"clip_ratio": 0.2, "clip_ratio_low": None, "clip_ratio_high": None, "global_batch_info": info, **options}
    )
    found = []
    for function in (core_algos.compute_policy_loss_vanilla, core_algos.get_policy_loss_fn("grpo_fast")):
        inputs = batch()
        moved = normal(B, T, seed=2)
        moved[0, :2], moved[1, 0] = torch.tensor([30.0, -30.0]), 1000.0  # beyond where verl bounds them
        log_prob = (inputs["old_log_prob"] + moved).requires_grad_()
        loss, metrics = function(
            log_prob=log_prob,
            loss_agg_mode=mode,
            config=config,
            rollout_is_weights=None if weights is None else normal(*weights, seed=3, scale=0.3).exp(),
            **inputs,
        )
        found.append((loss, torch.autograd.grad(loss, log_prob)[0], metrics))
    (want, want_grad, want_metrics), (loss, grad, metrics) = found
    torch.testing.assert_close(loss, want, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(grad, want_grad, rtol=1e-5, atol=1e-6)
    assert metrics == pytest.approx(want_metrics, rel=1e-5, abs=1e-6)
    assert metrics["actor/pg_clipfrac"] > 0.1
    assert metrics["actor/pg_clipfrac_lower"] > 0


def test_an_unknown_aggregation_is_refused() -> None:
    config = ActorConfig(clip_ratio=0.2, clip_ratio_low=None, clip_ratio_high=None, global_batch_info={})
    with pytest.raises(ValueError, match="loss_agg_mode: got 'median'"):
        ours.policy_loss(log_prob=normal(B, T, seed=2), loss_agg_mode="median", config=config, **batch())


def test_a_global_batch_without_its_size_is_refused() -> None:
    config = ActorConfig(clip_ratio=0.2, clip_ratio_low=None, clip_ratio_high=None, global_batch_info={"dp_size": 2})
    for mode, name in (("token-mean", "batch_num_tokens"), ("seq-mean-token-mean", "global_batch_size")):
        with pytest.raises(ValueError, match=f"{name}: got None with dp_size=2"):
            ours.policy_loss(log_prob=normal(B, T, seed=2), loss_agg_mode=mode, config=config, **batch())


def test_patching_is_idempotent_and_undone() -> None:
    theirs = ours._THEIRS["verl.utils.kernel.linear_cross_entropy.linear_cross_entropy"]
    try:
        for _ in range(2):
            ours.unpatch_verl()
        assert kernel.linear_cross_entropy is theirs
        assert FusedLinearForPPO.forward is ours._THEIR_FORWARD
        assert core_algos.verl_F.entropy_from_logits is not ours.entropy_from_logits
    finally:
        for _ in range(2):
            ours.patch_verl()
    assert kernel.linear_cross_entropy is ours.linear_cross_entropy
    assert FusedLinearForPPO.forward is ours.fused_linear_forward
    assert core_algos.verl_F.entropy_from_logits is ours.entropy_from_logits


def test_the_setting_for_external_modules() -> None:
    code = (
        "import verl; from verl.utils.torch_functional import logprobs_from_logits as f;"
        "from verl.trainer.ppo.core_algos import get_policy_loss_fn as g;"
        "assert f.__module__ == g('grpo_fast').__module__ == 'grpo_fast.integrations.verl'"
    )
    environment = {**os.environ, "VERL_USE_EXTERNAL_MODULES": "grpo_fast.integrations.verl"}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment, timeout=120)


def test_the_example_sets_what_verl_has() -> None:
    """Its settings are of verl's configuration, and name what there is."""
    hydra = pytest.importorskip("hydra")
    settings = runpy.run_path(str(Path(__file__).parents[1] / "examples/verl_grpo.py"))["SETTINGS"]
    folder = str(Path(core_algos.__file__).parents[1] / "config")
    with hydra.initialize_config_dir(folder, version_base=None):
        config = hydra.compose("ppo_trainer", overrides=settings).actor_rollout_ref
    assert config.model.use_fused_kernels
    assert config.model.external_lib == ours.__name__
    assert core_algos.get_policy_loss_fn(config.actor.policy_loss.loss_mode) is ours.policy_loss

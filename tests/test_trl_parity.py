"""The reference against the installed TRL: its own loss code runs beside ours, loss and gradients compared."""

from __future__ import annotations

import dataclasses
import itertools
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from grpo_fast import GRPOLossConfig, group_advantages, grpo_loss, linear_distillation_loss, linear_grpo_loss

trl = pytest.importorskip("trl", minversion="1.16")

from trl.trainer.distillation_trainer import _chunked_divergence_loss  # noqa: E402
from trl.trainer.grpo_trainer import GRPOTrainer  # noqa: E402
from trl.trainer.utils import entropy_from_logits, nanstd, selective_log_softmax  # noqa: E402

B, P, T, V, G = 6, 3, 7, 13, 3


def make_inputs(seed: int, **shapes: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """A batch in TRL's layout: ragged masks, ratios on both sides of every clip, both signs of advantage."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64) * scale

    mask = torch.ones(B, T, dtype=torch.long)
    for row in range(B):
        mask[row, int(torch.randint(1, T + 1, (), generator=g)) :] = 0
    logits = normal(B, T, V, scale=1.5)
    ids = torch.randint(0, V, (B, T), generator=g)
    logps = logits.log_softmax(-1).gather(-1, ids[..., None])[..., 0]
    return {
        "logits": logits,
        "prompt_ids": torch.zeros(B, P, dtype=torch.long),
        "prompt_mask": torch.ones(B, P, dtype=torch.long),
        "completion_ids": ids,
        "completion_mask": mask,
        "advantages": normal(*shapes.get("advantages", (B,))),
        "old_per_token_logps": logps + normal(B, T, scale=0.4),
        "ref_per_token_logps": logps + normal(B, T, scale=0.5),
        "sampling_per_token_logps": logps + normal(B, T, scale=0.5),
        "importance_sampling_ratio": torch.where(
            mask.bool() if shapes.get("is_ratio", (B, T)) == (B, T) else torch.ones(B, 1, dtype=torch.bool),
            normal(*shapes.get("is_ratio", (B, T)), scale=0.3).exp(),
            1.0,
        ),
        "num_items_in_batch": torch.tensor(29.0, dtype=torch.float64),
    }


class StandIn:
    """The state that TRL's ``_compute_loss`` reads, with log-probs from given logits instead of a model's."""

    def __init__(self, logits: torch.Tensor, config: GRPOLossConfig, **overrides: Any) -> None:
        self.logits = logits
        self.args = SimpleNamespace(**dataclasses.asdict(config), steps_per_generation=1)
        for name in (
            "loss_type",
            "beta",
            "importance_sampling_level",
            "off_policy_mask_threshold",
            "entropy_coef",
        ):
            setattr(self, name, getattr(config, name))
        self.epsilon_low, self.epsilon_high = config.epsilon_low, config.clip_high
        self.max_completion_length = config.max_completion_length
        self.top_entropy_quantile = overrides.pop("top_entropy_quantile", 1.0)
        self.use_vllm = self.vllm_importance_sampling_correction = overrides.pop("use_vllm", False)
        self._entropy_bonus_enabled = config.entropy_coef != 0
        self.use_adaptive_entropy = self.aux_loss_enabled = False
        self.current_gradient_accumulation_steps = 1
        self.model = SimpleNamespace(training=True)
        self._metrics: dict[str, Any] = {"train": defaultdict(list)}
        self.accelerator = SimpleNamespace(
            num_processes=1,
            sync_gradients=False,
            gather=lambda x: x,
            reduce=lambda x, reduction: x,
            pad_across_processes=lambda x, dim, pad_index: x,
        )
        assert not overrides

    get_off_policy_mask = staticmethod(GRPOTrainer.get_off_policy_mask)
    get_gamma_weights = staticmethod(GRPOTrainer.get_gamma_weights)
    get_high_entropy_mask = GRPOTrainer.get_high_entropy_mask

    def _get_per_token_logps_and_entropies(
        self, model: Any, ids: torch.Tensor, mask: Any, keep: int, **_: Any
    ) -> Any:
        return selective_log_softmax(self.logits, ids[:, -keep:]), entropy_from_logits(self.logits), None


def compare(config: GRPOLossConfig, seed: int = 0, **options: Any) -> None:
    """Run TRL's loss and ours on the same inputs; compare loss, gradient of the logits, and metrics."""
    shapes = {k: options.pop(k) for k in ("advantages", "is_ratio") if k in options}
    on_policy = options.pop("on_policy", False)
    inputs = make_inputs(seed, **shapes)
    if on_policy:
        del inputs["old_per_token_logps"]
    logits = inputs.pop("logits")

    theirs = logits.clone().requires_grad_()
    stand_in = StandIn(theirs, config, **options)
    trl_loss = GRPOTrainer._compute_loss(stand_in, None, inputs)
    trl_loss.backward()

    entropy_mask = None
    if stand_in.top_entropy_quantile < 1:
        quantile = 1 - stand_in.top_entropy_quantile
        mask = inputs["completion_mask"]
        entropy_mask = GRPOTrainer.get_high_entropy_mask(stand_in, entropy_from_logits(logits), mask, quantile)

    ours = logits.clone().requires_grad_()
    out = grpo_loss(
        ours,
        inputs["completion_ids"],
        completion_mask=inputs["completion_mask"],
        advantages=inputs["advantages"],
        old_logps=inputs.get("old_per_token_logps"),
        ref_logps=inputs["ref_per_token_logps"],
        sampling_logps=inputs["sampling_per_token_logps"],
        importance_sampling_ratio=(
            inputs["importance_sampling_ratio"] if stand_in.use_vllm or config.loss_type == "vespo" else None
        ),
        entropy_mask=entropy_mask,
        num_items_in_batch=(inputs["num_items_in_batch"] if config.loss_type in ("dapo", "cispo", "vespo") else None),
        config=config,
    )
    out.loss.backward()

    torch.testing.assert_close(out.loss, trl_loss, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-10, atol=1e-12)
    assert theirs.grad is not None
    assert theirs.grad.abs().max() > 1e-6
    recorded = {name: values[-1] for name, values in stand_in._metrics["train"].items()}
    shared = recorded.keys() & out.metrics.keys()
    assert "entropy" in shared
    for name in shared:
        assert out.metrics[name].item() == pytest.approx(float(recorded[name]), rel=1e-6, abs=1e-9), name


LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo", "cispo", "sapo", "vespo")


def config_for(loss_type: str, **options: Any) -> GRPOLossConfig:
    if loss_type == "cispo":
        options.setdefault("epsilon_high", 1.3)
    return GRPOLossConfig(loss_type=loss_type, max_completion_length=11, **options)


@pytest.mark.parametrize("correction", [False, True])
@pytest.mark.parametrize("beta", [0.0, 0.3])
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_loss_types(loss_type: str, level: str, beta: float, correction: bool) -> None:
    for seed, on_policy in itertools.product(range(2), (False, True)):
        config = config_for(loss_type, importance_sampling_level=level, beta=beta, use_bias_correction_kl=correction)
        compare(config, seed, on_policy=on_policy)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize(
    "options",
    [
        {"advantages": (B, T)},
        {"use_vllm": True},
        {"use_vllm": True, "is_ratio": (B, 1)},
        {"top_entropy_quantile": 0.4},
        {"config": {"entropy_coef": 0.05}},
        {"top_entropy_quantile": 0.4, "config": {"entropy_coef": 0.05}},
        {"config": {"off_policy_mask_threshold": 0.1}},
        {"config": {"off_policy_mask_threshold": 0.1}, "advantages": (B, T)},
        {"config": {"epsilon_low": 0.1, "epsilon_high": 0.5}},
        {"advantages": (B, T), "config": {"importance_sampling_level": "sequence", "beta": 0.1}},
    ],
    ids=lambda o: "-".join(f"{k}={v}" for k, v in o.items()),
)
def test_options(loss_type: str, options: dict[str, Any]) -> None:
    options = dict(options)
    config = config_for(loss_type, **{"beta": 0.05, **options.pop("config", {})})
    compare(config, seed=3, **options)


@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dr_grpo", "dapo", "luspo"])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_delta_bounds_the_ratio_after_kl_used_it(loss_type: str, level: str) -> None:
    compare(config_for(loss_type, delta=1.25, beta=0.4, importance_sampling_level=level), seed=5)


def test_trl_clips_where_the_inputs_reach() -> None:
    """The grid above exercises the clips: both sides are hit on its inputs."""
    inputs = make_inputs(0)
    out = grpo_loss(
        inputs["logits"],
        inputs["completion_ids"],
        completion_mask=inputs["completion_mask"],
        advantages=inputs["advantages"],
        old_logps=inputs["old_per_token_logps"],
    )
    assert out.metrics["clip_ratio/low_mean"] > 0.02
    assert out.metrics["clip_ratio/high_mean"] > 0.02


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_group_advantages(scale: str) -> None:
    """Against TRL's own formula around its ``nanstd``, with unscorable completions."""
    rewards = torch.randn(12, dtype=torch.float64)
    rewards[[1, 7]] = torch.nan
    mean = rewards.view(-1, G).nanmean(1).repeat_interleave(G)
    if scale == "batch":
        std = nanstd(rewards).expand_as(rewards)
    else:
        std = nanstd(rewards.view(-1, G), dim=1).repeat_interleave(G)
    want = rewards - mean if scale == "none" else (rewards - mean) / (std + 1e-4)
    got = group_advantages(rewards, group_size=G, scale=scale)
    torch.testing.assert_close(got, want.nan_to_num(nan=0.0))


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("num_items", [None, 17])
def test_distillation(beta: float, num_items: int | None) -> None:
    torch.manual_seed(0)
    hs, ws = torch.randn(2, 5, 8, requires_grad=True), torch.randn(V, 8, requires_grad=True)
    ht, wt = torch.randn(2, 5, 6), torch.randn(V, 6)
    bs, bt = torch.randn(V, requires_grad=True), torch.randn(V)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    options = dict(student_logit_scale=0.7, teacher_logit_scale=1.2, temperature=1.3)
    trl_loss, _, _ = _chunked_divergence_loss(
        hs,
        ht,
        ws,
        wt,
        mask,
        beta,
        num_items_in_batch=num_items,
        student_lm_head_bias=bs,
        teacher_lm_head_bias=bt,
        student_final_logit_softcapping=3.0,
        teacher_final_logit_softcapping=4.0,
        **options,
    )
    want = torch.autograd.grad(trl_loss, (hs, ws, bs))
    loss = linear_distillation_loss(
        hs,
        ws,
        ht,
        wt,
        completion_mask=mask,
        beta=beta,
        num_items_in_batch=num_items,
        student_bias=bs,
        teacher_bias=bt,
        student_softcap=3.0,
        teacher_softcap=4.0,
        **options,
    )
    torch.testing.assert_close(loss, trl_loss)
    for ours, theirs in zip(torch.autograd.grad(loss, (hs, ws, bs)), want, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


@pytest.fixture(scope="module")
def tiny_parts(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    vocabulary = {token: i for i, token in enumerate(["<pad>", "<eos>", *"0123456789+="])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        pad_token_id=0,
        eos_token_id=1,
    )
    folder = tmp_path_factory.mktemp("trl")
    torch.manual_seed(1)
    LlamaForCausalLM(config).save_pretrained(folder)  # TRL loads its reference model from the policy's folder
    fast.save_pretrained(folder)
    return folder, fast, Dataset.from_dict({"prompt": ["1+1="] * 8})


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_a_real_trainer(loss_type: str, tiny_parts: Any) -> None:
    """A whole ``GRPOTrainer``, its model forward and head included, against ``linear_grpo_loss``."""
    folder, tokenizer, dataset = tiny_parts
    trainer = GRPOTrainer(
        model=str(folder),
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=trl.GRPOConfig(
            output_dir=str(folder / "run"),
            model_init_kwargs={"dtype": "float32"},
            loss_type=loss_type,
            beta=0.1,
            temperature=0.8,
            max_completion_length=T,
            num_generations=2,
            per_device_train_batch_size=B,
            report_to=[],
            use_cpu=True,
            bf16=False,
        ),
        train_dataset=dataset,
        processing_class=tokenizer,
    )
    trainer.current_gradient_accumulation_steps = 1
    model = trainer.model
    g = torch.Generator().manual_seed(2)
    vocabulary = model.config.vocab_size
    inputs = {
        "prompt_ids": torch.randint(2, vocabulary, (B, P), generator=g),
        "prompt_mask": torch.ones(B, P, dtype=torch.long),
        "completion_ids": torch.randint(2, vocabulary, (B, T), generator=g),
        "completion_mask": (torch.arange(T) < torch.tensor([7, 3, 1, 5, 7, 2])[:, None]).long(),
        "advantages": torch.randn(B, generator=g),
        "old_per_token_logps": -2.6 + 0.3 * torch.randn(B, T, generator=g),
        "ref_per_token_logps": -2.6 + 0.3 * torch.randn(B, T, generator=g),
        "num_items_in_batch": torch.tensor(25.0),
    }
    model.train()
    want = trainer._compute_loss(model, inputs)
    want_grads = torch.autograd.grad(want, list(model.parameters()))

    hidden = model.model(
        torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1),
        attention_mask=torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1),
    ).last_hidden_state
    out = linear_grpo_loss(
        hidden[:, P - 1 : -1],
        model.lm_head.weight,
        inputs["completion_ids"],
        completion_mask=inputs["completion_mask"],
        advantages=inputs["advantages"],
        old_logps=inputs["old_per_token_logps"],
        ref_logps=inputs["ref_per_token_logps"],
        num_items_in_batch=inputs["num_items_in_batch"] if loss_type in ("dapo", "cispo", "vespo") else None,
        temperature=0.8,
        config=GRPOLossConfig(loss_type=loss_type, beta=0.1, max_completion_length=T),
    )
    torch.testing.assert_close(out.loss, want, rtol=1e-5, atol=1e-6)
    for ours, theirs in zip(torch.autograd.grad(out.loss, list(model.parameters())), want_grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)

"""TRL's trainers with grpo_fast inside: the same losses, metrics and weights, step by step, as TRL alone."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import re
import runpy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

trl = pytest.importorskip("trl", minversion="1.16")

from conftest import DEVICE, rand  # noqa: E402
from datasets import Dataset  # noqa: E402
from tokenizers import Tokenizer, models, pre_tokenizers  # noqa: E402
from transformers import (  # noqa: E402
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedTokenizerFast,
    TrainingArguments,
)
from trl.trainer import distillation_trainer, utils  # noqa: E402

from grpo_fast.integrations import _versions  # noqa: E402
from grpo_fast.integrations._trl_functions import _THEIR_DIVERGENCE  # noqa: E402
from grpo_fast.integrations.trl import FastGRPOTrainer, patch_trl, unpatch_trl  # noqa: E402

VOCABULARY = ["<pad>", "<eos>", *"0123456789+="]
PROMPTS = [f"{a}+{b}=" for a in range(4) for b in range(2)]
SIZES = dict(vocab_size=len(VOCABULARY), hidden_size=16, intermediate_size=32, num_hidden_layers=1)
SPECIAL = dict(num_attention_heads=2, num_key_value_heads=2, pad_token_id=0, eos_token_id=1)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({token: i for i, token in enumerate(VOCABULARY)}, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    """A model and its tokenizer on disk, where TRL finds the reference model too."""
    path = tmp_path_factory.mktemp("llama")
    torch.manual_seed(1)
    LlamaForCausalLM(LlamaConfig(**SIZES, **SPECIAL)).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture
def patched() -> Iterator[None]:
    patch_trl()
    yield
    unpatch_trl()


def reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
    """Something that differs within a group and can be learned."""
    return [float(sum(ids) % 5) for ids in completion_ids]


def common(folder: Path) -> dict[str, Any]:
    return dict(
        output_dir=str(folder / "run"),
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        max_steps=20,
        learning_rate=5e-3,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
    )


def make_trainer(cls: type, folder: Path, tokenizer: Any, model: Any = None, **options: Any) -> Any:
    peft_config = options.pop("peft_config", None)
    args = dict(max_completion_length=5, num_generations=4, num_iterations=3, model_init_kwargs={"dtype": "float32"})
    return cls(
        model=str(folder) if model is None else model,
        reward_funcs=reward,
        args=trl.GRPOConfig(**{**common(folder), **args, **options}),
        train_dataset=Dataset.from_dict({"prompt": PROMPTS}),
        eval_dataset=Dataset.from_dict({"prompt": PROMPTS[:2]}),
        processing_class=tokenizer,
        peft_config=peft_config,
    )


def assert_same_runs(theirs: Any, ours: Any) -> None:
    """Train both; every number of the logs agrees to 1e-4, every weight to 1e-4, and the weights have moved."""
    start = {name: p.detach().clone() for name, p in theirs.model.named_parameters() if p.requires_grad}
    for trainer in (theirs, ours):
        torch.manual_seed(0)  # of the samples
        trainer.train()
    assert len(theirs.state.log_history) == len(ours.state.log_history) > 10
    for one, other in zip(theirs.state.log_history, ours.state.log_history, strict=True):
        assert one.keys() == other.keys()
        for name, value in one.items():
            if not any(word in name for word in ("time", "runtime", "per_second", "profiling")):
                assert other[name] == pytest.approx(value, rel=1e-4, abs=1e-4, nan_ok=True), name
    weights = dict(ours.model.named_parameters())
    assert max((p - start[name]).abs().max() for name, p in weights.items() if name in start) > 1e-3
    for name, p in theirs.model.named_parameters():
        torch.testing.assert_close(weights[name], p, rtol=1e-4, atol=1e-4)


RUNS: dict[str, dict[str, Any]] = {
    "grpo": dict(loss_type="grpo", beta=0.1, temperature=0.7),
    "bnpo": dict(loss_type="bnpo", delta=1.3, epsilon=0.1, epsilon_high=0.2, beta=0.05, use_bias_correction_kl=False),
    "dr_grpo": dict(loss_type="dr_grpo", entropy_coef=0.05, scale_rewards="none", gradient_checkpointing=False),
    "dapo": dict(loss_type="dapo", top_entropy_quantile=0.5, entropy_coef=0.02),
    "luspo": dict(loss_type="luspo", importance_sampling_level="sequence", epsilon=3e-3, epsilon_high=4e-3),
    "cispo": dict(loss_type="cispo", epsilon_high=1.1, mask_truncated_completions=True),
    "sapo": dict(loss_type="sapo", off_policy_mask_threshold=0.01, beta=0.1),
    "vespo": dict(loss_type="vespo", vespo_k_pos=1.5),
    "adaptive entropy": dict(use_adaptive_entropy=True, entropy_coef=0.01, entropy_target=2.6),
    "steps per generation": dict(steps_per_generation=4, eval_strategy="steps", eval_steps=6, entropy_coef=0.02),
    "cast_lm_head_to_fp32": dict(cast_lm_head_to_fp32=True),
}


@pytest.mark.parametrize("options", RUNS.values(), ids=RUNS)
def test_grpo(options: dict[str, Any], folder: Path, tokenizer: Any) -> None:
    assert_same_runs(*(make_trainer(cls, folder, tokenizer, **options) for cls in (trl.GRPOTrainer, FastGRPOTrainer)))


def test_mixed_precision(folder: Path, tokenizer: Any) -> None:
    """TRL rounds logits to bfloat16 under autocast, we do not: losses and metrics agree to that."""
    logs = []
    for cls in (trl.GRPOTrainer, FastGRPOTrainer):
        trainer = make_trainer(cls, folder, tokenizer, bf16=True, beta=0.1, max_steps=4)
        torch.manual_seed(0)
        trainer.train()
        logs.append([log for log in trainer.state.log_history if "loss" in log])
    assert len(logs[0]) == 4
    for one, other in zip(*logs, strict=True):
        for name in ("loss", "entropy", "kl", "grad_norm"):
            assert other[name] == pytest.approx(one[name], rel=5e-3, abs=1e-3), name


def test_every_loss_type_runs() -> None:
    documented = trl.GRPOConfig.__doc__.split("loss_type (`str`")[1].split("mask_truncated_completions")[0]
    assert {options.get("loss_type", "dapo") for options in RUNS.values()} == set(
        re.findall('- `"(.+)"`', documented)
    )


def test_lora(folder: Path, tokenizer: Any) -> None:
    """The head is frozen, and the reference model is the policy without its adapter."""
    peft = pytest.importorskip("peft")

    def trainer(cls: type) -> Any:
        lora = peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=4)
        return make_trainer(cls, folder, tokenizer, peft_config=lora, beta=0.1, learning_rate=2e-2)

    ours = trainer(FastGRPOTrainer)
    assert not ours.model.get_output_embeddings().weight.requires_grad
    assert_same_runs(trainer(trl.GRPOTrainer), ours)


def test_mixture_of_experts(folder: Path, tokenizer: Any) -> None:
    def trainer(cls: type) -> Any:
        torch.manual_seed(0)
        config = MixtralConfig(**SIZES, **SPECIAL, num_local_experts=4, router_aux_loss_coef=0.1)
        return make_trainer(cls, folder, tokenizer, MixtralForCausalLM(config), model_init_kwargs=None)

    ours = trainer(FastGRPOTrainer)
    assert_same_runs(trainer(trl.GRPOTrainer), ours)
    assert ours.state.log_history[0]["aux_loss"] > 0.5


B, P, T = 6, 3, 5


def make_batch(ratio: tuple[int, int]) -> dict[str, torch.Tensor]:
    """What TRL's generation hands to its loss, with what only vLLM and tools bring."""
    g = torch.Generator().manual_seed(0)
    mask = (torch.arange(T) < torch.tensor([5, 3, 1, 5, 4, 2])[:, None]).long()
    tool_mask = (torch.rand(B, T, generator=g) > 0.2).long()
    tool_mask[:, 0] = 1
    old = -2.6 + 0.3 * torch.randn(B, T, generator=g)
    sampling = old + 0.3 * torch.randn(B, T, generator=g)
    sampling[1, 1] = torch.nan  # a token that vLLM could not score
    weights = (0.5 * torch.randn(*ratio, generator=g)).exp()
    return {
        "prompt_ids": torch.randint(2, len(VOCABULARY), (B, P), generator=g),
        "prompt_mask": torch.ones(B, P, dtype=torch.long),
        "completion_ids": torch.randint(2, len(VOCABULARY), (B, T), generator=g),
        "completion_mask": mask,
        "tool_mask": tool_mask,
        "advantages": torch.randn(B, generator=g),
        "old_per_token_logps": old,
        "sampling_per_token_logps": sampling,
        "ref_per_token_logps": -2.6 + 0.3 * torch.randn(B, T, generator=g),
        "importance_sampling_ratio": torch.where(mask * tool_mask == 0, 1.0, weights) if ratio[1] > 1 else weights,
        "num_items_in_batch": (mask * tool_mask).sum(),
    }


@pytest.mark.parametrize("per_token_advantages", [False, True])
@pytest.mark.parametrize("ratio", [(B, T), (B, 1)], ids=["token ratios", "sequence ratios"])
@pytest.mark.parametrize("loss_type", ["dapo", "grpo", "vespo"])
def test_what_vllm_and_tools_bring(
    loss_type: str, ratio: tuple[int, int], per_token_advantages: bool, folder: Path, tokenizer: Any
) -> None:
    batch = make_batch(ratio)
    if per_token_advantages:
        batch["advantages"] = torch.randn(B, T, generator=torch.Generator().manual_seed(1))
    options = dict(loss_type=loss_type, beta=0.1, off_policy_mask_threshold=0.05, gradient_checkpointing=False)
    found = []
    for cls in (trl.GRPOTrainer, FastGRPOTrainer):
        trainer = make_trainer(cls, folder, tokenizer, **options)
        trainer.use_vllm = trainer.vllm_importance_sampling_correction = True
        trainer.current_gradient_accumulation_steps = 2
        trainer.model.train()
        loss = trainer._compute_loss(trainer.model, dict(batch))
        grads = torch.autograd.grad(loss, list(trainer.model.parameters()))
        found.append((loss, grads, {name: values[-1] for name, values in trainer._metrics["train"].items()}))
    (want, want_grads, want_metrics), (loss, grads, metrics) = found
    torch.testing.assert_close(loss, want, rtol=1e-5, atol=1e-6)
    assert metrics == pytest.approx(want_metrics, rel=1e-5, abs=1e-6)
    for ours, theirs in zip(grads, want_grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    assert max(g.abs().max() for g in grads) > 1e-3


def test_the_example_learns(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(Path(__file__).parents[1] / "examples/trl_grpo.py"), run_name="__main__")
    (said,) = re.findall(r"mean reward: (\S+) in the first five steps, (\S+) in the last", capsys.readouterr().out)
    first, last = map(float, said)
    assert last > first + 0.1


# Several processes ----------------------------------------------------------------------------------------------


def run_ranks(task: str, folder: Path, options: dict[str, Any]) -> dict[str, Any]:
    """What the two ranks of trl_ranks.py find."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launcher, str(Path(__file__).parent / "trl_ranks.py"), task, str(folder), json.dumps(options)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, timeout=300, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads((folder / "ranks.json").read_text())
    return found


ZERO_3 = {
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "zero_allow_untested_optimizer": True,
}
TIED = {"dtype": "float32", "tie_word_embeddings": True}
RANKS = {
    "DDP, tokens": dict(loss_type="dapo", top_entropy_quantile=0.5, entropy_coef=0.02),
    "DDP, sequences": dict(loss_type="grpo", importance_sampling_level="sequence", epsilon=1e-3, epsilon_high=2e-3),
    "ZeRO-3": dict(deepspeed=ZERO_3, top_entropy_quantile=0.5, beta=0.1),
    "ZeRO-3, tied": dict(deepspeed=ZERO_3, model_init_kwargs=TIED),
    "ZeRO-3, distillation": dict(distills=True, deepspeed=ZERO_3),
}


@pytest.mark.parametrize("options", RANKS.values(), ids=RANKS)
def test_two_processes(options: dict[str, Any], folder: Path) -> None:
    """Normalizers, thresholds and metrics are of both ranks' tokens, and the head is whole."""
    if "deepspeed" in options:
        pytest.importorskip("deepspeed", exc_type=ImportError)
    found = run_ranks("train", folder, options)
    logs, weights = found.pop("TRL")
    for our_logs, our_weights in found.values():
        for one, other in zip(logs, our_logs, strict=True):
            assert other == pytest.approx(one, rel=1e-4, abs=1e-4)
        assert our_weights == pytest.approx(weights, rel=1e-4, abs=1e-4)


SHARDS = {
    "a head of its own": dict(tied=False, head_alone=False),
    "a tied head": dict(tied=True, head_alone=False),
    "a head in a group of its own": dict(tied=False, head_alone=True),
}


@pytest.fixture(scope="module")
def shards(folder: Path) -> dict[str, Any]:
    return run_ranks("shard", folder, SHARDS)


@pytest.mark.parametrize("case", SHARDS)
def test_under_fsdp2(case: str, shards: dict[str, Any]) -> None:
    """One micro-batch has the loss and the gradients of the model in one piece."""
    loss, gradients = shards[case]["in one piece"]
    for name in ("TRL", "ours", "patched"):
        our_loss, our_gradients = shards[case][name]
        assert our_loss == pytest.approx(loss, rel=1e-5, abs=1e-6)
        *rest, (head, our_head) = zip(map(torch.tensor, gradients), map(torch.tensor, our_gradients), strict=True)
        for want, got in rest:
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)
        if SHARDS[case]["head_alone"] and name != "ours":
            # Where TRL gathers the head, each rank's gradient of it is of its own batch alone.
            assert (our_head - head).norm() > 0.5 * head.norm()
        else:
            torch.testing.assert_close(our_head, head, rtol=1e-4, atol=1e-6)


# What is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(loss_type="cispo", delta=1.5), "delta: got 1.5 with loss_type='cispo'"),
        (dict(loss_type="no such"), "loss_type: got 'no such'"),
        (dict(importance_sampling_level="word"), "importance_sampling_level: got 'word'"),
        (dict(epsilon=1.5), "epsilon_low: got 1.5"),
    ],
    ids=lambda x: "-".join(x) if isinstance(x, dict) else "",
)
def test_refused_options(options: dict[str, Any], message: str, folder: Path, tokenizer: Any) -> None:
    with pytest.raises(ValueError, match=message):
        make_trainer(FastGRPOTrainer, folder, tokenizer, **options)


def test_a_head_that_is_more_than_linear_is_refused(folder: Path, tokenizer: Any) -> None:
    class Quantized(torch.nn.Linear):
        pass

    model = LlamaForCausalLM.from_pretrained(folder)
    model.lm_head.__class__ = Quantized
    with pytest.raises(ValueError, match=r"model: the head of LlamaForCausalLM is a .*Quantized"):
        make_trainer(FastGRPOTrainer, folder, tokenizer, model)
    model.lm_head.__class__ = torch.nn.Linear
    model.lm_head.register_forward_hook(lambda module, inputs, output: output.square())
    with pytest.raises(ValueError, match="model: LlamaForCausalLM has more than a scale and a softcap"):
        make_trainer(FastGRPOTrainer, folder, tokenizer, model)


def test_a_processor_is_refused(folder: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    real = trl.GRPOTrainer.__init__

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        real(self, *args, **kwargs)
        self._is_vlm = True

    monkeypatch.setattr(trl.GRPOTrainer, "__init__", init)
    with pytest.raises(ValueError, match="processing_class: got a processor"):
        make_trainer(FastGRPOTrainer, folder, tokenizer)


def test_an_unknown_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for version in ("1.15.3", "1.17.0", "2.0.0.dev0"):
        monkeypatch.setattr(_versions.importlib.metadata, "version", lambda _, version=version: version)
        with pytest.raises(ImportError, match=rf"trl {version} is installed; .* supports trl>=1.16,<1.17"):
            _versions.require("trl", oldest="1.16", below="1.17")
    monkeypatch.undo()
    with pytest.raises(ImportError, match="no-such is not installed"):
        _versions.require("no-such", oldest="1.0", below="2.0")


def test_every_option_is_accounted_for() -> None:
    """An option that TRL adds is either of the loss, and then ours to honour, or of what we leave to TRL."""
    of_the_loss = {
        *("loss_type", "importance_sampling_level", "epsilon", "epsilon_high", "delta", "beta"),
        *("use_bias_correction_kl", "sapo_temperature_pos", "sapo_temperature_neg"),
        *("vespo_k_pos", "vespo_k_neg", "vespo_lambda_pos", "vespo_lambda_neg"),
        *("off_policy_mask_threshold", "top_entropy_quantile", "max_completion_length", "temperature"),
        *("entropy_coef", "use_adaptive_entropy", "entropy_coef_min", "entropy_coef_max", "entropy_coef_delta"),
        *("entropy_target", "router_aux_loss_coef", "cast_lm_head_to_fp32", "steps_per_generation"),
    }
    of_trl = {
        *("model_init_kwargs", "trust_remote_code", "disable_dropout", "num_generations", "num_generations_eval"),
        *("ds3_gather_for_generation", "shuffle_dataset", "pad_to_multiple_of", "generation_batch_size"),
        *("top_p", "top_k", "min_p", "generation_kwargs", "chat_template_kwargs", "repetition_penalty"),
        *("cache_implementation", "use_vllm", "num_iterations", "reward_weights", "multi_objective_aggregation"),
        *("scale_rewards", "mask_truncated_completions", "sync_ref_model", "ref_model_mixup_alpha"),
        *("ref_model_sync_steps", "max_tool_calling_iterations", "log_completions", "log_multimodal"),
        *("num_completions_to_print", "log_unique_prompts", "log_completions_hub_repo"),
        *("use_transformers_continuous_batching", "transformers_continuous_batching_config"),
        *("use_transformers_paged", "vllm_mode", "vllm_model_impl", "vllm_enable_sleep_mode", "vllm_server_base_url"),
        *("vllm_server_host", "vllm_server_port", "vllm_server_timeout", "vllm_group_port"),
        *("vllm_gpu_memory_utilization", "vllm_max_model_length", "vllm_tensor_parallel_size"),
        *("vllm_structured_outputs_regex", "vllm_importance_sampling_correction", "vllm_importance_sampling_mode"),
        *("vllm_importance_sampling_cap", "vllm_importance_sampling_clip_min", "vllm_importance_sampling_clip_max"),
    }
    inherited = {field.name for field in dataclasses.fields(TrainingArguments)}
    names = {field.name for field in dataclasses.fields(trl.GRPOConfig)} - inherited
    assert names == of_the_loss | of_trl
    assert not of_the_loss & of_trl


# The other trainers ----------------------------------------------------------------------------------------------


def make_sft(folder: Path, tokenizer: Any) -> Any:
    return trl.SFTTrainer(
        model=str(folder),
        args=trl.SFTConfig(**common(folder), model_init_kwargs={"dtype": "float32"}),
        train_dataset=Dataset.from_dict({"prompt": PROMPTS, "completion": [f"{i}" for i in range(len(PROMPTS))]}),
        processing_class=tokenizer,
    )


def make_dpo(folder: Path, tokenizer: Any) -> Any:
    numbers = range(len(PROMPTS))
    columns = {"prompt": PROMPTS, "chosen": [f"{i}" for i in numbers], "rejected": [f"{i}0" for i in numbers]}
    return trl.DPOTrainer(
        model=str(folder),
        args=trl.DPOConfig(**common(folder), model_init_kwargs={"dtype": "float32"}),
        train_dataset=Dataset.from_dict(columns),
        processing_class=tokenizer,
    )


def make_rloo(folder: Path, tokenizer: Any) -> Any:
    options = dict(max_completion_length=5, num_generations=4, num_iterations=3, beta=0.05)
    return trl.RLOOTrainer(
        model=str(folder),
        reward_funcs=reward,
        args=trl.RLOOConfig(**common(folder), **options, model_init_kwargs={"dtype": "float32"}),
        train_dataset=Dataset.from_dict({"prompt": PROMPTS}),
        processing_class=tokenizer,
    )


def make_kto(folder: Path, tokenizer: Any) -> Any:
    numbers = range(len(PROMPTS))
    columns = {"prompt": PROMPTS, "completion": [f"{i}" for i in numbers], "label": [i % 2 == 0 for i in numbers]}
    return trl.KTOTrainer(
        model=str(folder),
        args=trl.KTOConfig(**common(folder), model_init_kwargs={"dtype": "float32"}),
        train_dataset=Dataset.from_dict(columns),
        processing_class=tokenizer,
    )


def make_distillation(beta: float, folder: Path, tokenizer: Any, **options: Any) -> Any:
    """A teacher that is twice as wide."""
    torch.manual_seed(2)
    teacher = LlamaForCausalLM(LlamaConfig(**{**SIZES, "hidden_size": 32}, **SPECIAL))
    args = dict(beta=beta, temperature=0.8, max_completion_length=5, model_init_kwargs={"dtype": "float32"})
    return trl.DistillationTrainer(
        model=str(folder),
        teacher_model=teacher,
        args=trl.DistillationConfig(**{**common(folder), **args, **options}),
        train_dataset=Dataset.from_dict({"prompt": PROMPTS}),
        processing_class=tokenizer,
    )


PATCHED_TRAINERS = {
    "sft": (make_sft, "linear_selective_log_softmax"),
    "dpo": (make_dpo, "linear_selective_log_softmax"),
    "kto": (make_kto, "linear_selective_log_softmax"),
    "rloo": (make_rloo, "linear_selective_log_softmax"),
    "forward KL": (functools.partial(make_distillation, 0.0), "linear_distillation_loss"),
    "JSD": (functools.partial(make_distillation, 0.1), "linear_distillation_loss"),
    "reverse KL": (functools.partial(make_distillation, 1.0), "linear_distillation_loss"),
}


@pytest.mark.parametrize(("make", "op"), PATCHED_TRAINERS.values(), ids=PATCHED_TRAINERS)
def test_patched_trainers(make: Any, op: str, folder: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = make(folder, tokenizer)
    theirs_train, calls = theirs.train, []
    monkeypatch.setattr(theirs, "train", lambda: (unpatch_trl(), theirs_train(), patch_trl()))
    real = patch_trl.__globals__[op]

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(kwargs)
        return real(*args, **kwargs)

    monkeypatch.setitem(patch_trl.__globals__, op, counted)
    try:
        assert_same_runs(theirs, make(folder, tokenizer))
    finally:
        unpatch_trl()
    assert len(calls) >= 12


def test_all_outputs_of_the_patched_function(patched: None) -> None:
    g = torch.Generator().manual_seed(0)
    arguments = [torch.randn(shape, generator=g, requires_grad=True) for shape in ((9, 8), (33, 8), (33,))]
    targets = torch.randint(0, 33, (9,), generator=g)
    results = []
    for function in (trl.kernels.ChunkedLogProbFunction, utils._ChunkedLogProbFunction):
        outputs = function.apply(*arguments, targets, 0.7, 16, 2.0, 1.3)
        loss = (outputs[0] * torch.arange(9)).sum() + (outputs[1] * torch.arange(9)).sum()
        results.append([*outputs, *torch.autograd.grad(loss, arguments)])
    for theirs, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_the_patched_divergence(beta: float, impl: str, patched: None) -> None:
    """Of models of different widths, with biases, scales and softcaps, which few architectures have."""
    patch_trl(impl=impl)
    shapes = ((9, 8), (33, 8), (33,), (9, 6), (33, 6), (33,))
    arguments = [rand(*shape, seed=i).requires_grad_() for i, shape in enumerate(shapes)]
    results = []
    for function in (_THEIR_DIVERGENCE, distillation_trainer.ChunkedDivergenceFunction):
        divergence, entropy = function.apply(*arguments, beta, 0.7, 1.3, 2.0, 0.8, 3.0)
        assert not entropy.requires_grad
        grads = torch.autograd.grad((divergence * torch.arange(9, device=DEVICE)).sum(), arguments[:3])
        results.append([divergence, entropy, *grads])
    for theirs, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_the_divergence_has_the_precision_of_autocast(patched: None) -> None:
    g = torch.Generator().manual_seed(0)
    arguments = [torch.randn(shape, generator=g) for shape in ((9, 8), (33, 8), (9, 6), (33, 6))]
    hidden, weight, teacher_hidden, teacher_weight = arguments
    with torch.autocast("cpu", torch.bfloat16):
        theirs, ours = (
            function.apply(hidden, weight, None, teacher_hidden, teacher_weight, None, 0.5)
            for function in (_THEIR_DIVERGENCE, distillation_trainer.ChunkedDivergenceFunction)
        )
    exact, _ = _THEIR_DIVERGENCE.apply(hidden, weight, None, teacher_hidden, teacher_weight, None, 0.5)
    assert (theirs[0] - exact).abs().max() > 1e-4
    for one, other in zip(theirs, ours, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-5)


def patched_functions() -> tuple[Any, Any]:
    return utils._ChunkedLogProbFunction, distillation_trainer.ChunkedDivergenceFunction


def test_patching_is_idempotent_and_undone() -> None:
    originals = patched_functions()
    for _ in range(2):
        patch_trl(impl="torch")
    assert not set(originals) & set(patched_functions())
    for _ in range(2):
        unpatch_trl()
    assert patched_functions() == originals


def test_a_refused_implementation_changes_nothing(folder: Path, tokenizer: Any) -> None:
    originals = patched_functions()
    with pytest.raises(ValueError, match="impl: got 'fastest', want None or one of cuda, triton, torch"):
        patch_trl(impl="fastest")
    with pytest.raises(ValueError, match="impl: got 'fastest', want None or one of cuda, triton, torch"):
        make_trainer(functools.partial(FastGRPOTrainer, impl="fastest"), folder, tokenizer)
    assert patched_functions() == originals


def test_importing_grpo_fast_imports_no_other_library() -> None:
    code = "import sys, grpo_fast; assert not {'trl', 'transformers', 'verl'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)

"""Every setting of a training run: defaults, then a model's preset, then a file, then the command line."""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from grpo_fast import GRPOLossConfig
from grpo_fast.train.language import script_words
from grpo_fast.train.tasks import TASKS, Task, load_task


def _setting(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings of ``grpo-fast train``; each field's ``metadata["help"]`` says what it is, with its unit.

    Raises:
        ValueError: A value is out of its range; the message names it.
    """

    model: str = _setting(
        "tiny",
        "'tiny', 'tiny-student', 'small' or 'small-student' (0.4, 0.1, 6.4, 1.6 M parameters, characters), "
        "'smollm2-135m', a folder or a hub name",
    )
    task: str = _setting("chain_sum", f"what to learn: {', '.join(TASKS)}")
    task_options: str = _setting("{}", "the task's own settings as JSON, such as '{\"max_terms\": 4}'")
    seed: int = _setting(0, "everything random follows from it and the step")
    device: str = _setting("auto", "'cpu', 'cuda', or 'auto': the GPU if there is one")
    shard: bool = _setting(False, "under torchrun: spread the model over the ranks by FSDP2")

    cold_start_steps: int = _setting(600, "most supervised steps on worked traces before GRPO; 0 for none")
    cold_start_batch: int = _setting(64, "traces a supervised step")
    cold_start_lr: float = _setting(1e-3, "AdamW's learning rate in the cold start")
    cold_start_until: float = _setting(
        0.45, "end the cold start when the sampled accuracy on dev problems reaches this"
    )
    cold_start_check: int = _setting(10, "supervised steps between two looks at that accuracy")

    steps: int = _setting(140, "GRPO steps; each samples a batch and makes num_iterations updates on it")
    prompts: int = _setting(32, "problems a step")
    group_size: int = _setting(8, "completions a problem (G)")
    max_new_tokens: int = _setting(64, "longest completion, in tokens")
    temperature: float = _setting(1.0, "sampling temperature, in the loss too")
    rollout: str = _setting("model", "what samples in training: the 'model' itself, or 'vllm', a server")
    vllm_server: str = _setting("", "address of that server, such as http://localhost:8000")
    vllm_importance_sampling_clip_max: float = _setting(
        3.0, "upper bound of a token's weight: its probability by the model over that by the server"
    )
    minibatches: int = _setting(4, "updates a batch is dealt out to; from the second on the ratio is not 1")
    num_iterations: int = _setting(1, "times each batch is gone through")
    micro_prompts: int = _setting(32, "problems a backward pass; fewer need less memory, the gradient is the same")
    lr: float = _setting(1e-4, "AdamW's learning rate at its peak")
    warmup_steps: int = _setting(10, "GRPO steps of linear warm-up; then linear decay to a tenth")
    max_grad_norm: float = _setting(0.3, "gradients are clipped to this norm")
    weight_decay: float = _setting(0.0, "AdamW's weight decay")

    loss_type: str = _setting("dapo", "grpo, bnpo, dr_grpo, dapo, luspo, cispo, sapo or vespo")
    importance_sampling_level: str = _setting("token", "'token', or 'sequence' for GSPO")
    epsilon_low: float = _setting(0.2, "lower clip: ratios below 1 - epsilon_low")
    epsilon_high: float = _setting(0.2, "upper clip: ratios above 1 + epsilon_high")
    beta: float = _setting(0.01, "weight of the KL to the model that GRPO started from; 0 for no reference model")
    kl_estimator: str = _setting("k3", "k1, k2 or k3")
    scale_rewards: str = _setting(
        "group", "divide rewards by the std of their 'group', of the 'batch', or by nothing ('none')"
    )
    lm_head_dtype: str = _setting(
        "float32", "'float32' or 'bfloat16': the precision of hidden states and head where logits are made of them"
    )
    sparse_grad_tol: float = _setting(
        0.0, "error that the gradient of GRPO's logits may have, 1e-4 to 0.1 (docs/sparse.md), on Hopper; 0 for none"
    )

    format_weight: float = _setting(0.1, "reward for <think>...</think><answer>...</answer>; a right answer is 1")
    language_weight: float = _setting(0.0, "reward for the share of the thought's words that are of the language")
    language: str = _setting(
        "trace", "which language: 'trace' for that of the task's worked traces, or a script, such as 'latin'"
    )
    overlong_buffer: int = _setting(0, "soft overlong penalty over the last so many tokens; 0 for none")
    repetition_weight: float = _setting(0.0, "penalty for repeated 4-grams of tokens, at most this; 0 for none")
    reward: str = _setting("", "a reward function of your own, 'module:function', added with weight 1")

    eval_every: int = _setting(20, "GRPO steps between two evaluations on dev problems; 0 for none")
    eval_problems: int = _setting(100, "dev problems of such an evaluation")
    eval_samples: int = _setting(8, "samples a problem, for pass@1 and cons@k")
    eval_batch: int = _setting(512, "completions sampled at once in an evaluation; more need more memory")
    test_problems: int = _setting(250, "test problems, evaluated before and after GRPO only")
    save_every: int = _setting(50, "steps between two checkpoints")

    def __post_init__(self) -> None:
        for f in fields(self):
            value, default = getattr(self, f.name), f.default
            if isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool):
                object.__setattr__(self, f.name, float(value))
            elif type(value) is not type(default):
                raise ValueError(f"{f.name}: got {value!r}, want {_article(type(default).__name__)}")
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"{f.name}: got {value}, want a finite number")
        for name in _AT_LEAST_ONE + _AT_LEAST_ZERO:
            least = 1 if name in _AT_LEAST_ONE else 0
            if not getattr(self, name) >= least:
                raise ValueError(f"{name}: got {getattr(self, name)}, want at least {least}")
        if not self.temperature > 0:
            raise ValueError(f"temperature: got {self.temperature}, want more than 0")
        if self.task not in TASKS:
            raise ValueError(f"task: got {self.task!r}, want one of {', '.join(TASKS)}")
        if self.device not in ("auto", "cpu", "cuda"):
            raise ValueError(f"device: got {self.device!r}, want auto, cpu or cuda")
        if self.group_size < 2:
            raise ValueError(f"group_size: got {self.group_size}, want at least 2, or every advantage is 0")
        if self.prompts % self.minibatches:
            raise ValueError(f"minibatches: got {self.minibatches}, want a divisor of prompts = {self.prompts}")
        if self.overlong_buffer > self.max_new_tokens:
            raise ValueError(
                f"overlong_buffer: got {self.overlong_buffer}, want at most max_new_tokens = {self.max_new_tokens}"
            )
        if self.lm_head_dtype not in ("float32", "bfloat16"):
            raise ValueError(f"lm_head_dtype: got {self.lm_head_dtype!r}, want float32 or bfloat16")
        if self.sparse_grad_tol and self.lm_head_dtype != "bfloat16":
            raise ValueError(
                f"sparse_grad_tol: got {self.sparse_grad_tol} with lm_head_dtype = {self.lm_head_dtype!r}, want "
                f"bfloat16, or 0 for a dense gradient"
            )
        if self.rollout not in ("model", "vllm"):
            raise ValueError(f"rollout: got {self.rollout!r}, want model or vllm")
        if bool(re.match(r"https?://[^/]", self.vllm_server)) != (self.rollout == "vllm"):
            wanted = "an address such as http://localhost:8000" if self.rollout == "vllm" else "none"
            raise ValueError(f"vllm_server: got {self.vllm_server!r}, want {wanted} with rollout = {self.rollout!r}")
        if self.language != "trace":
            script_words(self.language)
        self.task_overrides()
        self.loss()

    def loss(self) -> GRPOLossConfig:
        """The options of the loss."""
        names = {f.name for f in fields(GRPOLossConfig)} & {f.name for f in fields(self)}
        return GRPOLossConfig(**{n: getattr(self, n) for n in names}, max_completion_length=self.max_new_tokens)

    def load_task(self, **overrides: Any) -> Task:
        """The task, its problems drawn by the seed; ``overrides`` win over ``task_options``."""
        # Items of reasoning-gym are drawn from seed + index, so seeds must lie further apart than a run reads.
        return load_task(self.task, **{"seed": self.seed * 10**9, **self.task_overrides(), **overrides})

    def task_overrides(self) -> dict[str, Any]:
        """``task_options`` as a dictionary."""
        try:
            overrides = json.loads(self.task_options)
        except json.JSONDecodeError as error:
            raise ValueError(f"task_options: got {self.task_options!r}, want a JSON object ({error})") from error
        if not isinstance(overrides, dict):
            raise ValueError(f"task_options: got {self.task_options!r}, want a JSON object")
        return overrides


_AT_LEAST_ONE = tuple(
    "cold_start_batch cold_start_check steps prompts max_new_tokens minibatches num_iterations micro_prompts "
    "eval_problems eval_samples eval_batch test_problems save_every "
    "vllm_importance_sampling_clip_max".split()
)
_AT_LEAST_ZERO = tuple(
    "seed cold_start_steps cold_start_lr lr warmup_steps max_grad_norm weight_decay format_weight language_weight "
    "overlong_buffer repetition_weight sparse_grad_tol eval_every".split()
)

#: What a model changes in the defaults.
PRESETS: dict[str, dict[str, Any]] = {
    "smollm2-135m": {
        "task_options": '{"min_terms": 2, "max_terms": 3}',
        "cold_start_steps": 100,
        "cold_start_batch": 32,
        "cold_start_lr": 2e-5,
        "cold_start_until": 0.25,
        "cold_start_check": 5,
        "steps": 250,
        "group_size": 16,
        "minibatches": 2,
        "micro_prompts": 8,
        "lr": 1e-5,
        "max_grad_norm": 1.0,
        "eval_every": 25,
    },
}


def load_settings(overrides: Mapping[str, Any], file: Path | None = None) -> Settings:
    """Settings from defaults, the model's preset, a YAML, TOML or JSON file, and ``overrides``, later ones winning.

    Raises:
        ValueError: The file is of no known kind or no mapping, or a key or value is wrong; the message names it.
    """
    given = {} if file is None else _read(file)
    known = {f.name for f in fields(Settings)}
    for key in [*given, *overrides]:
        if key not in known:
            raise ValueError(f"{key}: no such setting, want one of {', '.join(sorted(known))}")
    given = {**given, **overrides}
    return Settings(**{**PRESETS.get(str(given.get("model")), {}), **given})


def _read(file: Path) -> dict[str, Any]:
    try:
        text = file.read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"config: cannot read {file}: {error.strerror}") from error
    try:
        data = _PARSERS[file.suffix](text)
    except KeyError:
        raise ValueError(f"config: got {file}, want a file ending in {', '.join(_PARSERS)}") from None
    except ValueError as error:
        raise ValueError(f"config: {file} does not parse: {error}") from error
    if not isinstance(data, dict):
        raise ValueError(f"config: got {type(data).__name__} in {file}, want settings by name")
    return data


def _parse_yaml(text: str) -> Any:
    import yaml

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error


def _parse_toml(text: str) -> Any:
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    return tomllib.loads(text)


_PARSERS: dict[str, Callable[[str], Any]] = {
    ".yaml": _parse_yaml,
    ".yml": _parse_yaml,
    ".toml": _parse_toml,
    ".json": json.loads,
}


def _article(name: str) -> str:
    return {"int": "an int", "float": "a number", "str": "a string"}.get(name, name)

"""Malformed calls: each raises before anything runs, naming the argument, what came and what is wanted."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch

import grpo_fast
from grpo_fast import GRPOLossConfig, backend

B, T, V, H, N = 4, 5, 7, 3, 11


def x(*shape: int) -> torch.Tensor:
    return torch.zeros(*shape)


def ints(*shape: int) -> torch.Tensor:
    return torch.zeros(*shape, dtype=torch.long)


HEAD: dict[str, Any] = {"hidden": x(B, T, H), "weight": x(V, H)}
LOSS: dict[str, Any] = {"completion_ids": ints(B, T), "advantages": x(B)}
GOOD: dict[str, dict[str, Any]] = {
    "group_advantages": {"rewards": x(B), "group_size": 2},
    "selective_log_softmax": {"logits": x(B, T, V), "index": ints(B, T)},
    "grpo_loss": {"logits": x(B, T, V), **LOSS},
    "linear_selective_log_softmax": {**HEAD, "index": ints(B, T)},
    "linear_grpo_loss": {**HEAD, **LOSS},
    "linear_cross_entropy": {**HEAD, "labels": ints(B, T)},
    "linear_distillation_loss": {
        "student_hidden": x(B, T, H),
        "student_weight": x(V, H),
        "teacher_hidden": x(B, T, 2),
        "teacher_weight": x(V, 2),
    },
}

PACKED: dict[str, Any] = {
    "completion_ids": ints(N),
    "cu_seqlens": torch.tensor([0, 3, 3, 8, 11]),
    "advantages": x(B),
}
LOGITS_OPTIONS = [
    ({"temperature": 0.0}, "temperature: got 0.0, want a finite number > 0"),
    ({"temperature": "hot"}, "temperature: got 'hot', want a number"),
    ({"temperature": float("nan")}, "temperature: got nan"),
    ({"impl": "cudnn"}, "impl: got 'cudnn', want None or one of cuda, triton, torch"),
]
SCALE_OPTIONS = [
    (
        {"process_group": "tp"},
        "process_group: got str, want a torch.distributed.ProcessGroup that this rank belongs to",
    ),
    ({"logit_scale": -1.0}, "logit_scale: got -1.0, want a finite number > 0"),
    ({"softcap": 0}, "softcap: got 0, want a finite number > 0"),
]
HEAD_ERRORS = [
    ({"hidden": x(B, T, H + 1)}, r"weight: got shape \(7, 3\), want \(V, H\) = \(V, 4\)"),
    ({"hidden": ints(B, T, H)}, "hidden: got dtype int64, want float16 or bfloat16 or float32 or float64"),
    ({"hidden": [1.0]}, "hidden: got list, want a tensor"),
    ({"weight": x(V)}, r"weight: got shape \(7,\), want \(V, H\)"),
    ({"weight": x(1, H)}, "vocabulary: got V = 1, want at least 2"),
    ({"weight": x(V, H).to("meta")}, "weight: got a tensor on meta, want cpu like the others"),
    ({"bias": x(V + 1)}, r"bias: got shape \(8,\), want \(V,\) = \(7,\)"),
    ({"workspace_bytes": 0}, "workspace_bytes: got 0, want at least 1"),
    ({"workspace_bytes": 1e9}, "workspace_bytes: got 1000000000.0, want an int or None"),
    *LOGITS_OPTIONS,
    *SCALE_OPTIONS,
]
INDEX_ERRORS = [
    ({"index": ints(B, T + 1)}, r"index: got shape \(4, 6\), want \(dim 0, dim 1\) = \(4, 5\)"),
    ({"index": x(B, T)}, "index: got dtype float32, want int32 or int64"),
    ({"mask": x(B)}, r"mask: got shape \(4,\)"),
]
LOSS_ERRORS = [
    ({"completion_ids": x(B, T)}, "completion_ids: got dtype float32, want int32 or int64"),
    ({"completion_ids": ints(B, T + 1)}, r"completion_ids: got shape \(4, 6\), want \(B, T\) = \(4, 5\)"),
    ({"completion_mask": x(B, 1)}, r"completion_mask: got shape \(4, 1\), want \(B, T\) = \(4, 5\)"),
    ({"completion_mask": torch.zeros(B, T, dtype=torch.complex64)}, "completion_mask: got dtype complex64"),
    ({"advantages": None}, "advantages: got neither advantages and rewards, want exactly one"),
    ({"rewards": x(B), "group_size": 2}, "advantages: got both advantages and rewards, want exactly one"),
    (
        {"advantages": x(B + 1)},
        r"advantages: got shape \(5,\), want \(B,\) = \(4,\) or \(B, 1\) = \(4, 1\) or",
    ),
    ({"group_size": 2}, "group_size: got one with advantages, want it only with rewards"),
    ({"advantages": None, "rewards": x(B)}, "group_size: got neither group_size and group_ids"),
    ({"advantages": None, "rewards": x(B), "group_size": 3}, "group_size: got 3, want .* a divisor of B = 4"),
    (
        {"advantages": None, "rewards": x(B, T), "group_size": 2},
        r"rewards: got shape \(4, 5\), want \(B,\) = \(4,\)",
    ),
    ({"old_logps": x(B)}, r"old_logps: got shape \(4,\), want \(B, T\) = \(4, 5\)"),
    ({"ref_logps": ints(B, T)}, "ref_logps: got dtype int64"),
    ({"config": GRPOLossConfig(beta=0.1)}, "ref_logps: got None with beta=0.1"),
    ({"sampling_logps": x(T, B)}, r"sampling_logps: got shape \(5, 4\)"),
    ({"importance_sampling_ratio": x(T)}, r"importance_sampling_ratio: got shape \(5,\), want \(B, T\)"),
    ({"entropy_mask": x(B)}, "entropy_mask: got shape"),
    ({"entropy_mask": x(B, T), "entropy_threshold": 1.0}, "entropy_threshold: got one beside entropy_mask"),
    ({"entropy_threshold": "high"}, "entropy_threshold: got 'high', want a number"),
    ({"num_items_in_batch": 0}, "num_items_in_batch: got 0, want a finite number > 0"),
    ({"num_items_in_batch": x(2)}, r"num_items_in_batch: got shape \(2,\), want \(\)"),
    (
        {"num_items_in_batch": 3, "config": GRPOLossConfig(loss_type="grpo")},
        "num_items_in_batch: got one with loss_type='grpo'",
    ),
    ({"config": {"beta": 0}}, "config: got dict, want a GRPOLossConfig"),
]
WEIGHT_GRAD_ERRORS = [
    ({"weight_grad_out": x(V, H).half()}, "weight_grad_out: got dtype float16, want float32"),
    ({"weight_grad_out": x(H, V)}, r"weight_grad_out: got shape \(3, 7\), want \(V, H\) = \(7, 3\)"),
    ({"weight_grad_out": x(V, H), "impl": "torch"}, "weight_grad_out: got one, want None where the gradients"),
]
REFERENCE_ERRORS = [
    ({"ref_hidden": x(B, T, 2)}, "ref_weight: got None with ref_hidden"),
    ({"ref_weight": x(V, 2)}, "ref_weight: got one without ref_hidden"),
    ({"ref_bias": x(V)}, "ref_bias: got one without ref_hidden"),
    ({"ref_hidden": x(B, T, 2), "ref_weight": x(V, 3)}, r"ref_weight: got shape \(7, 3\), want \(V, ref_H\)"),
    ({"ref_hidden": x(B, T, 2), "ref_weight": x(V + 1, 2)}, r"ref_weight: got shape \(8, 2\)"),
    ({"ref_hidden": x(B, T, 2), "ref_weight": x(V, 2), "ref_logps": x(B, T)}, "ref_hidden: got one beside ref_logps"),
    ({"metrics": "some"}, "metrics: got 'some', want one of all, active"),
]
LABEL_ERRORS = [
    ({"label_smoothing": 1.0}, "label_smoothing: got 1.0, want at least 0 and less than 1"),
    ({"label_smoothing": None}, "label_smoothing: got None, want a number"),
    ({"labels": x(B, T)}, "labels: got dtype float32"),
    ({"labels": ints(T)}, "labels: got shape"),
    ({"ignore_index": None}, "ignore_index: got None, want an int"),
    ({"reduction": "max"}, "reduction: got 'max', want one of mean, sum, none"),
    ({"reduction": "sum", "num_items_in_batch": 3}, "num_items_in_batch: got one with reduction='sum'"),
    ({"num_items_in_batch": -3}, "num_items_in_batch: got -3"),
]
DISTILLATION_ERRORS = [
    ({"student_hidden": x(B, T)}, r"student_weight: got shape \(7, 3\), want \(V, student_H\) = \(V, 5\)"),
    ({"student_hidden": None}, "student_hidden: got NoneType, want a tensor"),
    ({"teacher_hidden": x(B, T + 1, 2)}, r"teacher_hidden: got shape \(4, 6, 2\)"),
    (
        {"teacher_weight": x(V + 1, 2)},
        r"teacher_weight: got shape \(8, 2\), want \(V, teacher_H\) = \(7, 2\)",
    ),
    ({"teacher_weight": x(V, 3)}, r"teacher_weight: got shape \(7, 3\), want \(V, teacher_H\) = \(7, 2\)"),
    ({"student_bias": x(1)}, "student_bias: got shape"),
    ({"teacher_bias": ints(V)}, "teacher_bias: got dtype int64"),
    ({"completion_mask": x(T)}, "completion_mask: got shape"),
    ({"beta": 1.5}, "beta: got 1.5, want between 0"),
    ({"beta": "jsd"}, "beta: got 'jsd', want a number"),
    ({"reduction": "batchmean"}, "reduction: got 'batchmean'"),
    ({"teacher_logit_scale": 0.0}, "^teacher_logit_scale: got 0.0"),
    ({"student_softcap": -2.0}, "^student_softcap: got -2.0"),
    ({"workspace_bytes": 0}, "workspace_bytes: got 0, want at least 1"),
    *LOGITS_OPTIONS,
]
BAD: dict[str, list[tuple[dict[str, Any], str]]] = {
    "group_advantages": [
        ({"rewards": [1.0]}, "rewards: got list, want a tensor"),
        ({"rewards": ints(B)}, "rewards: got dtype int64"),
        ({"rewards": x(2, 2)}, r"rewards: got shape \(2, 2\), want \(B,\)"),
        ({"group_size": None}, "group_size: got neither"),
        ({"group_ids": ints(B)}, "group_size: got both"),
        ({"group_size": 3}, "group_size: got 3"),
        ({"group_size": 0}, "group_size: got 0"),
        ({"group_size": 2.0}, "group_size: got 2.0, want an int"),
        ({"group_size": None, "group_ids": ints(B + 1)}, "group_ids: got shape"),
        ({"group_size": None, "group_ids": x(B)}, "group_ids: got dtype float32"),
        ({"scale": "std"}, "scale: got 'std', want one of group, batch, none"),
        ({"impl": "cpu"}, "impl: got 'cpu'"),
    ],
    "selective_log_softmax": [
        ({"logits": "text"}, "logits: got str, want a tensor"),
        ({"logits": ints(B, T, V)}, "logits: got dtype int64"),
        ({"logits": x(B, T, 1)}, "vocabulary: got V = 1"),
        ({"logits": x(B, T, V).to("meta")}, "index: got a tensor on cpu, want meta"),
        *INDEX_ERRORS,
        *LOGITS_OPTIONS,
        *SCALE_OPTIONS,
    ],
    "grpo_loss": [
        ({"logits": x(B, V)}, r"logits: got shape \(4, 7\), want \(B, T, V\)"),
        ({"logits": x(B, T, V), "cu_seqlens": ints(2)}, r"logits: got shape \(4, 5, 7\), want \(N, V\)"),
        *[({"logits": x(N, V), **PACKED, **bad}, message) for bad, message in [
            ({"cu_seqlens": torch.tensor([0, 3, 2, 8, 11])}, r"cu_seqlens: got \[0, 3, 2, 8, 11\], want 0, then"),
            ({"cu_seqlens": torch.tensor([1, 3, 3, 8, 11])}, "cu_seqlens: got"),
            ({"cu_seqlens": torch.tensor([0, 3, 3, 8, 12])}, "up to N = 11"),
            ({"cu_seqlens": x(5)}, "cu_seqlens: got dtype float32"),
            ({"cu_seqlens": ints(0)}, r"cu_seqlens: got shape \(0,\)"),
            ({"advantages": x(3)}, r"advantages: got shape \(3,\), want \(B,\) = \(4,\)"),
            ({"config": GRPOLossConfig(loss_type="dr_grpo")}, "max_completion_length: got None with cu_seqlens"),
        ]],
        *LOSS_ERRORS,
        *LOGITS_OPTIONS,
        *SCALE_OPTIONS,
    ],
    "linear_selective_log_softmax": [*HEAD_ERRORS, *INDEX_ERRORS],
    "linear_grpo_loss": [*HEAD_ERRORS, *LOSS_ERRORS, *WEIGHT_GRAD_ERRORS, *REFERENCE_ERRORS],
    "linear_cross_entropy": [*HEAD_ERRORS, *LABEL_ERRORS, *WEIGHT_GRAD_ERRORS],
    "linear_distillation_loss": DISTILLATION_ERRORS,
}  # fmt: skip


def test_every_op_has_ten_malformed_calls() -> None:
    ops = {name for name in grpo_fast.__all__ if inspect.isfunction(getattr(grpo_fast, name))}
    assert ops == BAD.keys() == GOOD.keys() == backend.OPS.keys()
    assert min(map(len, BAD.values())) >= 10


@pytest.mark.parametrize("op", GOOD)
def test_the_good_call_is_good(op: str) -> None:
    getattr(grpo_fast, op)(**GOOD[op])
    getattr(grpo_fast, op)(**GOOD[op], impl="torch")


@pytest.mark.parametrize(
    ("op", "arguments", "message"),
    [(op, *case) for op, cases in BAD.items() for case in cases],
    ids=lambda value: value if isinstance(value, str) and value in BAD else "",
)
def test_malformed(op: str, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        getattr(grpo_fast, op)(**(GOOD[op] | arguments))


@pytest.mark.parametrize(
    ("op", "impl"), [(op, impl) for op in GOOD for impl in ("cuda", "triton") if impl not in backend.OPS[op]]
)
def test_an_implementation_that_is_not_there_is_refused_by_name(op: str, impl: str) -> None:
    with pytest.raises(RuntimeError, match=f"impl='{impl}': {op} has no such kernel in this version"):
        getattr(grpo_fast, op)(**GOOD[op], impl=impl)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss_type": "ppo"}, "loss_type: got 'ppo', want one of grpo, bnpo"),
        ({"importance_sampling_level": "group"}, "importance_sampling_level: got 'group'"),
        ({"kl_estimator": "k4"}, "kl_estimator: got 'k4', want one of k1, k2, k3"),
        ({"cispo_bounds": "both"}, "cispo_bounds: got 'both'"),
        ({"scale_rewards": True}, "scale_rewards: got True"),
        ({"epsilon_low": -0.1}, "epsilon_low: got -0.1, want a finite number >= 0"),
        ({"epsilon_low": 1.5}, "epsilon_low: got 1.5, want at most 1"),
        ({"epsilon_low": None}, "epsilon_low: got None, want a number"),
        ({"epsilon_high": float("inf")}, "epsilon_high: got inf"),
        ({"delta": 0.0}, "delta: got 0.0, want a finite number > 0"),
        ({"delta": 2.0, "loss_type": "cispo"}, "delta: got 2.0 with loss_type='cispo'"),
        ({"dual_clip": 1.0}, "dual_clip: got 1.0, want more than 1"),
        ({"dual_clip": 3.0, "loss_type": "sapo"}, "dual_clip: got 3.0 with loss_type='sapo'"),
        ({"beta": "0.1"}, "beta: got '0.1', want a number"),
        ({"beta": -1}, "beta: got -1"),
        ({"use_bias_correction_kl": 1}, "use_bias_correction_kl: got 1, want a bool"),
        ({"sapo_temperature_pos": 0}, "sapo_temperature_pos: got 0"),
        ({"vespo_k_neg": float("nan")}, "vespo_k_neg: got nan"),
        ({"off_policy_mask_threshold": True}, "off_policy_mask_threshold: got True, want a number or None"),
        ({"entropy_coef": float("nan")}, "entropy_coef: got nan"),
        ({"max_completion_length": 0}, "max_completion_length: got 0, want an int of at least 1"),
        ({"max_completion_length": 3.5}, "max_completion_length: got 3.5"),
    ],
)
def test_config(options: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        GRPOLossConfig(**options)


def test_config_takes_every_good_value() -> None:
    for loss_type in ("grpo", "bnpo", "dr_grpo", "dapo", "luspo", "cispo", "sapo", "vespo"):
        assert GRPOLossConfig(loss_type=loss_type).clip_high == 0.2
    assert GRPOLossConfig(epsilon_high=0.28).clip_high == 0.28

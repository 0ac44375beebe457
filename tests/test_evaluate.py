"""Evaluation and report: the statistics by hand, the report from made-up rows."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("reasoning_gym")

import torch

from grpo_fast.train import evaluate as module
from grpo_fast.train.corrections import Corrections, count_corrections
from grpo_fast.train.evaluate import (
    accuracy_by_length,
    evaluate,
    majority,
    mean_and_error,
    pass_at_k,
    rechecks,
)
from grpo_fast.train.recorder import Recorder, read_metrics
from grpo_fast.train.report import table, write
from grpo_fast.train.rollout import Rollout
from grpo_fast.train.tasks import load_task


def test_mean_and_standard_error() -> None:
    assert mean_and_error([0.0, 1.0, 0.5, 0.5]) == pytest.approx((0.5, (0.5 / 3 / 4) ** 0.5))
    assert mean_and_error([0.25]) == (0.25, 0.0)


@pytest.mark.parametrize(
    ("answers", "want"),
    [(["1", "2", "2"], "2"), (["1", "2"], "1"), ([None, None, "3"], "3"), ([None], None), ([" 4", "4 ", "5"], "4")],
)
def test_majority(answers: list[str | None], want: str | None) -> None:
    assert majority(answers) == want


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("Wait, that is 3", True),
        ("i check: 2", True),
        ("awaiting", False),
        ("1+2=3", False),
        ("let me redo it", True),
    ],
)
def test_rechecks(text: str, want: bool) -> None:
    assert rechecks(text) is want


@pytest.mark.parametrize(("right", "k"), [(0, 1), (1, 1), (2, 3), (3, 2), (4, 4), (5, 5), (6, 1)])
def test_pass_at_k_is_the_share_of_subsets_with_a_right_sample(right: int, k: int) -> None:
    samples = [True] * right + [False] * (6 - right)
    subsets = list(itertools.combinations(samples, k))
    assert pass_at_k(6, right, k) == pytest.approx(sum(any(s) for s in subsets) / len(subsets))


def test_accuracy_by_length_keeps_a_length_together() -> None:
    lengths = [5] * 10 + [7] * 1 + [9] * 5
    groups = accuracy_by_length(lengths, [True] * 10 + [False] + [True, False, True, False, True])
    assert groups == [[5.0, 10, 1.0], [pytest.approx(52 / 6), 6, 0.5]]
    assert accuracy_by_length([3], [False]) == [[3.0, 1, 0.0]]


@pytest.mark.parametrize(
    ("thought", "want"),
    [
        ("1+2=3,3;3-5=-2,-2", (2, 0, 0, 0, 0)),
        ("4-1=2,3;wait;4-1=3,3", (2, 1, 1, 1, 0)),
        ("4-1=2;wait;4-1=3", (2, 1, 1, 1, 0)),  # without a check, as in other sums
        ("4-1=2,3;wait;4-1=4,3", (2, 2, 1, 0, 0)),
        ("4-1=2,3;wait;4+1=5,5", (2, 1, 1, 0, 0)),  # another sum is no repair
        ("4-1=2,2;3+3=6,6", (2, 1, 0, 0, 0)),
        ("4-1=3,3;wait;4-1=3,3", (2, 0, 0, 0, 1)),
        ("wait;4-1=2;wait", (1, 1, 1, 0, 0)),
        ("4-1=;x;--1+2=1", (0, 0, 0, 0, 0)),
        ("", (0, 0, 0, 0, 0)),
    ],
)
def test_corrections(thought: str, want: tuple[int, ...]) -> None:
    text = f"<think>{thought}</think><answer>1+1=3;wait</answer>"
    assert count_corrections([text]) == Corrections(*want)
    assert count_corrections([text, text]) == Corrections(*(2 * n for n in want))


class Scripted:
    """A policy that says what it is told to: its prompts are the problems' answers."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        self.known: list[Any] = []

    def prompt(self, problem: Any) -> list[int]:
        self.known.append(problem)
        return [len(self.known) - 1]


def test_evaluate_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Problem i is answered right by i of 4 samples; the others agree on a wrong answer."""
    task = load_task("chain_sum")

    def sample(policy: Any, prompts: list[list[int]], *, group_size: int, temperature: float, **_: Any) -> Rollout:
        assert len(prompts) * group_size <= 8  # the batch
        texts = []
        for (number,) in prompts:
            problem = policy.known[number]
            place = task.problems("dev", 0, 5).index(problem)
            for k in range(group_size):
                right = k < place if temperature else place % 2 == 0
                texts.append(f"<think>hmm</think><answer>{problem.answer if right else '1000'}</answer>")
        n = len(texts)
        mask = torch.ones(n, 3, dtype=torch.bool)
        return Rollout(mask, mask, mask, mask, mask.float(), texts, torch.zeros(n, dtype=torch.bool))

    monkeypatch.setattr(module, "sample", sample)
    policy: Any = Scripted()
    found = evaluate(policy, task, "dev", problems=5, samples=4, max_new_tokens=3, temperature=1.0, seed=0, batch=8)
    assert found.pass_at_1 == pytest.approx((0 + 1 + 2 + 3 + 4) / 20)
    assert found.pass_at_1_se == pytest.approx(mean_and_error([0, 0.25, 0.5, 0.75, 1])[1])
    assert found.cons_at_k == pytest.approx(3 / 5)  # the tie goes to the first sample, which is right
    assert found.greedy == pytest.approx(3 / 5)
    assert [k for k, *_ in found.pass_at] == [1, 2, 4]
    assert [share for _, share, _ in found.pass_at] == pytest.approx([0.5, (0 + 3 + 5 + 6 + 6) / 30, 4 / 5])
    assert found.cons_at == []  # too few samples
    assert found.right_if_rechecked == found.pass_at_1
    assert found.by_length == [[3.0, 20, found.pass_at_1]]
    assert (found.mean_length, found.truncated, found.well_formed, found.rechecks) == (3.0, 0.0, 1.0, 1.0)
    monkeypatch.setattr(module, "CONSENSUS", (2, 4, 8))
    found = evaluate(policy, task, "dev", problems=5, samples=4, max_new_tokens=3, temperature=1.0, seed=0, batch=8)
    # Of two votes a problem: 0 + 0, 1 + 0 (a tie goes to the first), 1 + 0, 1 + 1 and 1 + 1.
    want = [[2, *mean_and_error([0, 0.5, 0.5, 1, 1])], [4, *mean_and_error([0, 0, 1, 1, 1])]]
    assert found.cons_at == [pytest.approx(one) for one in want]
    for bad in ({"problems": 0}, {"samples": 0}, {"batch": 0}):
        with pytest.raises(ValueError, match="want at least 1"):
            evaluate(
                policy, task, "dev", **({"problems": 1, "samples": 1} | bad), max_new_tokens=3, temperature=1, seed=0
            )


def fake_evaluation(level: float) -> dict[str, Any]:
    example = {"question": "1|2=?", "answer": "3", "completion": "`a`\n|b", "right": level > 0.5}
    shares = dict.fromkeys(("greedy", "pass_at_1", "cons_at_k", "truncated", "well_formed", "rechecks"), level)
    return {**shares, "problems": 10, "samples": 4, "pass_at_1_se": 0.02, "mean_length": 20.0, "examples": [example]}


@pytest.mark.parametrize("with_kl", [True, False])
def test_report(tmp_path: Path, with_kl: bool) -> None:
    recorder = Recorder(tmp_path, last_step=-1)
    recorder.write(0, {"eval/pass@1": 0.4, "eval/pass@1_se": 0.02, "eval/cons@k": 0.5, "eval/greedy": 0.6})
    for step in range(1, 30):
        row = {
            "reward": step / 30,
            "rewards/accuracy/mean": step / 30,
            "completions/mean_length": 20.0,
            "entropy": 0.1,
        }
        recorder.write(step, row | ({"kl": 0.01 * step} if with_kl else {}))
    recorder.close()
    summary = {
        "before": fake_evaluation(0.4),
        "after": fake_evaluation(0.75),
        "settings": {"model": "tiny", "task": "gcd", "seed": 0},
        "versions": {"torch": "x"},
        "device": "a CPU",
        "seconds": {"total": 12.0},
        "command": "grpo-fast train",
    }
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    assert write(tmp_path) == summary
    assert (tmp_path / "report.png").stat().st_size > 20_000
    text = (tmp_path / "report.md").read_text()
    assert "| pass@1, mean over samples | 40.0% ± 2.0% | 75.0% ± 2.0% | +35.0 points |" in text
    assert "cons@4" in text
    assert all(line.replace("\\|", "").count("|") == 5 for line in text.splitlines() if line.startswith("| "))
    assert table(summary).row_count == 6
    assert not list(tmp_path.glob("*partial*"))


def test_a_torn_last_row_is_left_out_and_another_is_named(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"st')
    assert [row["step"] for row in read_metrics(path)] == [1, 2]
    Recorder(tmp_path, last_step=1).close()
    assert [row["step"] for row in read_metrics(path)] == [1]
    path.write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(ValueError, match="line 2: no JSON object"):
        read_metrics(path)

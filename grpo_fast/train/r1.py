"""The recipe of DeepSeek-R1 in miniature (arXiv 2501.12948), stage by stage, each in a folder of its own.

    zero       R1-Zero: GRPO from a base that has seen just enough worked traces to know the format
    r1         R1: a cold start on worked traces, then GRPO; the teacher
    traces     rejection sampling: the teacher's answers that are right and well formed
    distilled  a student of a quarter of the size learns them by cross entropy
    student    RL on the distilled student
    control    RL on the same student without distillation, from a start like R1-Zero's
    measured   all of them on the same test problems

A stage that has ended is not run again, and one that was stopped goes on, so the whole command resumes.
"""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from grpo_fast.train.checkpoint import write_json
from grpo_fast.train.distill import DistillSettings, distill
from grpo_fast.train.evaluate import evaluate, mean_and_error
from grpo_fast.train.model import Policy, load_policy
from grpo_fast.train.recorder import SUMMARY_FILE, device_name, versions
from grpo_fast.train.rewards import extract_answer
from grpo_fast.train.rollout import sample
from grpo_fast.train.settings import Settings
from grpo_fast.train.supervised import worked
from grpo_fast.train.tasks import Problem, Task
from grpo_fast.train.traces import Traces, collect
from grpo_fast.train.trainer import SETTINGS_FILE, train

MEASURED_FILE = "measured.json"
TRACES_FILE = "traces.json"

#: The preset "tiny": sums of 3 to 5 one-digit numbers, on a laptop CPU.
TEACHER = Settings(model="tiny")
STUDENT = "tiny-student"
#: Where R1-Zero and the control begin: a model that knows the format and is right about one time in four.
BARELY = 0.25
#: A teacher that is mostly sure writes the same answer twice, so more problems bring more than more samples.
TRACE_PROBLEMS, TRACE_SAMPLES = 12_000, 2
STUDENT_STEPS, CONTROL_STEPS = 70, 210
#: Test problems by level: what the task asks for, and what no training problem did.
LEVELS: dict[str, dict[str, int]] = {
    "3 numbers": {"min_terms": 3, "max_terms": 3},
    "4 numbers": {"min_terms": 4, "max_terms": 4},
    "5 numbers": {"min_terms": 5, "max_terms": 5},
    "6 numbers, longer than any in training": {"min_terms": 6, "max_terms": 6},
}
#: Without a chain of thought: the completion begins with this.
NO_THOUGHT = "<think></think><answer>"

#: What is measured, and what the report calls it.
MODELS: dict[str, str] = {
    "zero/cold_start": "base, a short cold start",
    "zero/model": "R1-Zero",
    "r1/cold_start": "cold start",
    "r1/model": "R1, the teacher",
    "distilled/model": "distilled student",
    "student/model": "distilled student + RL",
    "control/model": "student, RL only",
}


def run_r1(
    folder: Path, *, seed: int = 0, device: str = "auto", divergence: float | None = None, small: bool = False
) -> dict[str, Any]:
    """Run all stages that are missing in ``folder``; returns what was measured.

    Args:
        seed: Everything random follows from it.
        device: As in ``Settings``.
        divergence: As in ``DistillSettings``: the student learns the teacher's distribution too.
        small: For tests: every stage in a few seconds, and nothing learned.

    Raises:
        RunStopped: SIGINT or SIGTERM came; the same call goes on.
    """
    base = replace(TEACHER, seed=seed, device=device, **(_SMALL if small else {}))
    counts = (4, 2) if small else (TRACE_PROBLEMS, TRACE_SAMPLES)
    student_steps, control_steps = (1, 2) if small else (STUDENT_STEPS, CONTROL_STEPS)
    task = base.load_task()

    def reinforce(name: str, settings: Settings) -> None:
        """A run of GRPO, its cold start included."""
        place = folder / name
        if not (place / SUMMARY_FILE).exists():
            train(settings, place, resume=(place / SETTINGS_FILE).exists(), command=f"grpo-fast r1, stage {name}")

    reinforce("zero", replace(base, cold_start_until=BARELY))
    reinforce("r1", base)
    if not (folder / TRACES_FILE).exists():
        first = base.cold_start_steps * base.cold_start_batch + base.steps * base.prompts
        teacher = load_policy(str(folder / "r1" / "model"), device=device)
        options: dict[str, Any] = dict(max_new_tokens=base.max_new_tokens, temperature=base.temperature, seed=seed)
        problems, samples = counts
        found = collect(teacher, task, first=first, problems=problems, samples=samples, **options)
        found.write(folder / TRACES_FILE)
    traces = Traces.read(folder / TRACES_FILE)
    if not (folder / "distilled" / SUMMARY_FILE).exists():
        # The teacher of a small run is never right.
        examples = worked(task.problems("train", 0, 8)) if small else traces.examples(task)
        settings = DistillSettings(model=STUDENT, divergence=divergence, device=device, seed=seed)
        teacher = None if divergence is None else load_policy(str(folder / "r1" / "model"), device=device)
        distill(settings, examples, folder / "distilled", teacher)
    model = str(folder / "distilled" / "model")
    reinforce("student", replace(base, model=model, cold_start_steps=0, steps=student_steps))
    reinforce("control", replace(base, model=STUDENT, cold_start_until=BARELY, steps=control_steps))
    if not (folder / MEASURED_FILE).exists():
        measured = measure(folder, base, task, traces, problems=4 if small else 200, samples=2 if small else 16)
        write_json(folder / MEASURED_FILE, measured)
    return dict(json.loads((folder / MEASURED_FILE).read_text(encoding="utf-8")))


def measure(
    folder: Path, base: Settings, task: Task, traces: Traces, *, problems: int, samples: int
) -> dict[str, Any]:
    """Every model on the same test problems, by level too, and without its chain of thought."""
    models, chosen = {}, task.problems("test", 0, problems)
    tasks = {level: base.load_task(**overrides) for level, overrides in LEVELS.items()}
    for name, title in MODELS.items():
        policy = load_policy(str(folder / name), device=base.device)
        options: dict[str, Any] = dict(
            max_new_tokens=base.max_new_tokens, temperature=base.temperature, seed=base.seed
        )
        found = asdict(evaluate(policy, task, "test", problems=problems, samples=samples, **options))
        levels = {}
        for level, other in tasks.items():
            few = evaluate(
                policy, other, "test", problems=max(problems // 2, 1), samples=max(samples // 4, 1), **options
            )
            levels[level] = (few.pass_at_1, few.pass_at_1_se)
        size = sum(p.numel() for p in policy.model.parameters())
        thoughtless = without_thought(policy, task, chosen)
        models[name] = {"title": title, "parameters": size, **found, "levels": levels, "without_thought": thoughtless}
    stages = ("zero", "r1", "distilled", "student", "control")
    summaries = {stage: json.loads((folder / stage / SUMMARY_FILE).read_text(encoding="utf-8")) for stage in stages}
    return {
        "models": models,
        "traces": {"kept": len(traces.kept), "sampled": traces.sampled, "right": traces.right},
        "seconds": {stage: summary["seconds"] for stage, summary in summaries.items()},
        "task": base.task,
        "seed": base.seed,
        "device": device_name(policy.device),
        "versions": versions(),
    }


def without_thought(policy: Policy, task: Task, problems: list[Problem]) -> tuple[float, float]:
    """Share of right answers, and its standard error, where the model has to answer at once (greedy).

    It was never trained to: this asks how much of its skill lies in the chain of thought, not how good a model
    without one could be.
    """
    begun = policy.completion(NO_THOUGHT)[:-1]
    texts = sample(
        policy,
        [[*policy.prompt(problem), *begun] for problem in problems],
        group_size=1,
        max_new_tokens=16,
        temperature=0.0,
        generator=None,
    ).texts
    answers = [extract_answer(NO_THOUGHT + text) for text in texts]
    return mean_and_error([float(task.verify(answer, p)) for answer, p in zip(answers, problems, strict=True)])


#: For tests.
_SMALL: dict[str, Any] = {
    "cold_start_steps": 2,
    "cold_start_batch": 8,
    "cold_start_check": 2,
    "steps": 2,
    "prompts": 4,
    "group_size": 2,
    "max_new_tokens": 12,
    "eval_every": 1,
    "eval_problems": 2,
    "eval_samples": 2,
    "test_problems": 2,
    "save_every": 1,
}


def lessons(measured: dict[str, Any]) -> list[tuple[str, bool, str]]:
    """What R1 taught, whether it holds here by more than two standard errors, and the numbers."""
    models = measured["models"]

    def beats(after: str, before: str) -> tuple[bool, str]:
        a, b = models[after], models[before]
        gain, error = a["pass_at_1"] - b["pass_at_1"], (a["pass_at_1_se"] ** 2 + b["pass_at_1_se"] ** 2) ** 0.5
        numbers = f"{b['title']} {b['pass_at_1']:.1%}, {a['title']} {a['pass_at_1']:.1%}"
        return gain > 2 * error, f"{numbers}: {gain * 100:+.1f} ± {error * 100:.1f} points"

    teacher = models["r1/model"]
    at_once, its_error = teacher["without_thought"]
    share = teacher["greedy"]
    error = (its_error**2 + share * (1 - share) / teacher["problems"]) ** 0.5
    thought = f"{teacher['title']}, greedy, {at_once:.1%} when it must answer at once, {share:.1%} when it may think"
    return [
        ("A chain of thought helps", share - at_once > 2 * error, thought),
        (
            "RL raises accuracy from a base that hardly knows more than the format",
            *beats("zero/model", "zero/cold_start"),
        ),
        ("RL raises it past what supervised traces gave", *beats("r1/model", "r1/cold_start")),
        (
            "A small model learns more from the teacher's traces than from RL",
            *beats("distilled/model", "control/model"),
        ),
        ("RL on top of distillation helps further", *beats("student/model", "distilled/model")),
    ]

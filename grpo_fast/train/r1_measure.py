"""What the models of ``grpo-fast r1`` can do, all on the same problems, and what that says of R1's lessons."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from grpo_fast.train.evaluate import evaluate, mean_and_error
from grpo_fast.train.model import Policy, load_policy
from grpo_fast.train.r1_presets import Preset
from grpo_fast.train.rewards import combine, extract_answer, reward_functions
from grpo_fast.train.rollout import sample
from grpo_fast.train.settings import Settings
from grpo_fast.train.tasks import Problem, Task

#: Test problems are drawn from this seed whatever the run's own is, so that runs are compared on the same ones. The
#: problem itself decides about its split, so none of them is in the training of any run.
HELD_OUT_SEED = 2**40
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


def measure(folder: Path, base: Settings, preset: Preset) -> dict[str, dict[str, Any]]:
    """Each model's ``Evaluation``, with its size, its accuracy by level and without a thought."""
    task = base.load_task(seed=HELD_OUT_SEED)
    levels = {name: base.load_task(seed=HELD_OUT_SEED, **options) for name, options in preset.levels.items()}
    chosen = task.problems("test", 0, preset.problems)
    options: dict[str, Any] = dict(
        max_new_tokens=base.max_new_tokens, temperature=base.temperature, seed=base.seed, batch=base.eval_batch
    )
    models = {}
    for name, title in MODELS.items():
        policy = load_policy(str(folder / name), device=base.device)
        found = asdict(evaluate(policy, task, "test", problems=preset.problems, samples=preset.samples, **options))
        texts = [example["completion"] for example in found["examples"]]
        rewards = combine(reward_functions(base, task), texts, {"problem": chosen[: len(texts)]}).total.tolist()
        by_level = {}
        for level, other in levels.items():
            few = evaluate(
                policy, other, "test", problems=preset.level_problems, samples=preset.level_samples, **options
            )
            by_level[level] = (few.pass_at_1, few.pass_at_1_se)
        models[name] = {
            "title": title,
            "parameters": sum(p.numel() for p in policy.model.parameters()),
            **found,
            "examples": [{**e, "reward": reward} for e, reward in zip(found["examples"], rewards, strict=True)],
            "levels": by_level,
            "without_thought": without_thought(policy, task, chosen),
        }
    return models


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


def lessons(models: dict[str, dict[str, Any]]) -> list[tuple[str, bool, str]]:
    """What R1 taught, whether it holds here by more than two standard errors, and the numbers."""

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
        ("It notices its slips: it waits more often after a wrong step than after a right one", *_notices(teacher)),
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


def _notices(model: dict[str, Any]) -> tuple[bool, str]:
    """As if steps were independent of each other, which those of one problem are not quite."""
    found = model["corrections"]
    slips, right = found["slips"], found["steps"] - found["slips"]
    if not slips or not right:
        return False, f"{model['title']}: {slips} wrong steps of {found['steps']}"
    noticed, alarms = found["noticed"] / slips, found["false_alarms"] / right
    error = (noticed * (1 - noticed) / slips + alarms * (1 - alarms) / right) ** 0.5
    waits = f"after {noticed:.1%} of {slips:,} wrong steps and {alarms:.1%} of {right:,} right ones"
    repairs = f"{found['repaired']:,} of {found['noticed']:,} then come out right"
    return noticed - alarms > 2 * error, f"{model['title']}, {waits}; {repairs}"

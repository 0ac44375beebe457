"""How large each stage of ``grpo-fast r1`` is."""

from __future__ import annotations

from dataclasses import dataclass, field

from grpo_fast.train.settings import Settings


def _sums(count: int) -> dict[str, int]:
    return {"min_terms": count, "max_terms": count}


@dataclass(frozen=True, kw_only=True)
class Preset:
    """The sizes of a recipe.

    Attributes:
        teacher: The run that makes the teacher; the other runs of RL differ from it by what stands below.
        student: The student, as in ``load_policy``.
        barely: Where R1-Zero and the control begin: their cold start ends at this accuracy, with a model that knows
            the format and little more.
        trace_problems, trace_samples: How many problems the teacher answers, and how often each. One that is mostly
            sure writes the same answer twice, so more problems bring more than more samples.
        student_steps, control_steps: GRPO steps of the distilled student, and of the one without distillation.
        problems, samples: Test problems that all models are measured on at the end, and samples of each.
        level_problems, level_samples: The same of each level.
        levels: Options of the task by level; those that a model was never trained on are named so.
    """

    teacher: Settings
    student: str
    barely: float = 0.25
    trace_problems: int = 12_000
    trace_samples: int = 2
    student_steps: int = 70
    control_steps: int = 210
    problems: int = 200
    samples: int = 64
    level_problems: int = 100
    level_samples: int = 8
    levels: dict[str, dict[str, int]] = field(default_factory=dict)


PRESETS: dict[str, Preset] = {
    # Two cores of a CPU, a quarter of an hour.
    "tiny": Preset(
        teacher=Settings(model="tiny", task="checked_sum", max_new_tokens=80, eval_samples=16),
        student="tiny-student",
        levels={
            "easy: 3 numbers": _sums(3),
            "medium: 4 numbers": _sums(4),
            "hard: 5 numbers": _sums(5),
            "longer than any in training: 6 numbers": _sums(6),
            "longer still: 7 numbers": _sums(7),
        },
    ),
    # One GPU, ten minutes.
    "small": Preset(
        teacher=Settings(
            model="small",
            task="checked_sum",
            task_options='{"min_terms": 3, "max_terms": 6, "max_digits": 2}',
            max_new_tokens=128,
            cold_start_steps=1500,
            cold_start_batch=128,
            steps=200,
            prompts=64,
            group_size=16,
            micro_prompts=64,
            eval_samples=16,
        ),
        student="small-student",
        trace_problems=16_000,
        student_steps=100,
        control_steps=300,
        problems=400,
        level_problems=200,
        levels={
            "easy: 3 numbers": _sums(3),
            "medium: 4 and 5 numbers": {"min_terms": 4, "max_terms": 5},
            "hard: 6 numbers": _sums(6),
            "longer than any in training: 7 numbers": _sums(7),
            "longer still: 8 numbers": _sums(8),
        },
    ),
}

"""How large each stage of ``grpo-fast r1`` is."""

from __future__ import annotations

from dataclasses import dataclass, field

from grpo_fast.train.settings import Settings


@dataclass(frozen=True, kw_only=True)
class Preset:
    """The sizes of a recipe.

    Attributes:
        teacher: The run that makes the teacher; the other runs of RL differ from it by what stands below.
        student: The student, as in ``load_policy``.
        barely: Where R1-Zero and the control begin: their cold start ends at this accuracy, with a model that knows
            the format and little more.
        language_weight: Of the language consistency reward, which only the teacher's own run of RL (R1) has.
        trace_problems, trace_samples: How many problems the teacher answers, and how often each. One that is mostly
            sure writes the same answer twice, so more problems bring more than more samples. After too few, and so
            too few steps of learning, the student stays behind one that has RL alone.
        distill_lr, distill_epochs: AdamW's learning rate in distillation, and times it goes through the traces.
        student_steps, control_steps: GRPO steps of the distilled student, and of the one without distillation.
        problems, samples: Test problems that all models are measured on at the end, and samples of each.
        level_problems, level_samples: The same of each level.
        levels: Options of the task by level; those that a model was never trained on are named so.
    """

    teacher: Settings
    student: str
    barely: float = 0.25
    language_weight: float = 1.0
    trace_problems: int = 12_000
    trace_samples: int = 2
    distill_lr: float = 3e-3
    distill_epochs: int = 5
    student_steps: int = 70
    control_steps: int = 210
    problems: int = 200
    samples: int = 64
    level_problems: int = 100
    level_samples: int = 8
    levels: dict[str, dict[str, int]] = field(default_factory=dict)


_NAMES = ("easy", "medium", "hard", "longer than any in training", "longer still")
_LEVELS = {f"{name}: {n} numbers": {"min_terms": n, "max_terms": n} for n, name in enumerate(_NAMES, start=3)}

PRESETS: dict[str, Preset] = {
    # Two CPU cores, 13 minutes.
    "tiny": Preset(
        teacher=Settings(
            model="tiny",
            task="checked_sum",
            max_new_tokens=80,
            cold_start_check=20,
            steps=120,
            eval_problems=60,
            eval_samples=16,
            test_problems=50,  # a run's own; all models are measured on ``problems`` at the end
        ),
        student="tiny-student",
        student_steps=50,
        control_steps=160,
        problems=120,
        level_problems=60,
        levels=_LEVELS,
    ),
    # One GPU.
    "small": Preset(
        teacher=Settings(
            model="small",
            task="checked_sum",
            task_options='{"max_digits": 2}',
            max_new_tokens=128,
            cold_start_steps=1500,
            cold_start_lr=5e-4,
            cold_start_check=20,
            steps=100,
            prompts=64,
            group_size=16,
            micro_prompts=64,
            eval_every=30,
            eval_samples=16,
            eval_batch=4096,
        ),
        student="small-student",
        trace_problems=60_000,
        trace_samples=1,
        distill_lr=1e-3,
        distill_epochs=3,
        student_steps=50,
        control_steps=150,
        problems=300,
        levels=_LEVELS,
    ),
}

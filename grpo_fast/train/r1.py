"""The recipe of DeepSeek-R1 in miniature (arXiv 2501.12948), stage by stage, each in a folder of its own.

    zero       R1-Zero: GRPO from a base that has seen just enough worked traces to know the format
    r1         R1: a cold start on worked traces, then GRPO with a language consistency reward; the teacher
    traces     rejection sampling: the teacher's answers that are right and well formed
    distilled  a student of a quarter of the size learns them by cross entropy
    student    RL on the distilled student
    control    RL on the same student without distillation, from a start like R1-Zero's
    measured   all of them on the same test problems

A stage that has ended is not run again, and one that was stopped goes on, so the whole command resumes.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from grpo_fast.train.corrections import count_corrections
from grpo_fast.train.distill import DistillSettings, distill
from grpo_fast.train.files import write_json
from grpo_fast.train.model import Policy, load_policy
from grpo_fast.train.r1_measure import measure
from grpo_fast.train.r1_presets import Preset
from grpo_fast.train.recorder import SUMMARY_FILE, device_name, versions
from grpo_fast.train.settings import Settings
from grpo_fast.train.traces import Traces, collect
from grpo_fast.train.trainer import SETTINGS_FILE, train

RECIPE_FILE = "recipe.json"
MEASURED_FILE = "measured.json"
TRACES_FILE = "traces.json"


def run_r1(
    folder: Path, preset: Preset, *, seed: int = 0, device: str = "auto", divergence: float | None = None
) -> dict[str, Any]:
    """Run all stages that are missing in ``folder``; returns what was measured.

    Args:
        folder: Of all stages.
        preset: How large they are.
        seed: Everything random follows from it.
        device: As in ``Settings``.
        divergence: As in ``DistillSettings``: the student learns the teacher's distribution too.

    Raises:
        ValueError: ``folder`` holds stages of another recipe, or several processes were started.
        RunStopped: SIGINT or SIGTERM came; the same call goes on.
    """
    if (ranks := int(os.environ.get("WORLD_SIZE", "1"))) > 1:
        raise ValueError(f"r1: got {ranks} ranks, want one process; grpo-fast train is what runs on several")
    recipe = {"seed": seed, "divergence": divergence, **asdict(preset)}
    recipe["teacher"] = {k: v for k, v in recipe["teacher"].items() if k not in ("seed", "device")}  # the call's
    _keep_to(folder / RECIPE_FILE, recipe)
    base = replace(preset.teacher, seed=seed, device=device)
    task = base.load_task()

    def reinforce(name: str, settings: Settings) -> None:
        """A run of GRPO, its cold start included."""
        place = folder / name
        if not (place / SUMMARY_FILE).exists():
            train(settings, place, resume=(place / SETTINGS_FILE).exists(), command=f"grpo-fast r1, stage {name}")

    def teacher() -> Policy:
        return load_policy(str(folder / "r1" / "model"), device=device)

    reinforce("zero", replace(base, cold_start_until=preset.barely))
    reinforce("r1", replace(base, language_weight=preset.language_weight))
    if not (folder / TRACES_FILE).exists():
        found = collect(
            teacher(),
            task,
            first=base.cold_start_steps * base.cold_start_batch + base.steps * base.prompts,
            problems=preset.trace_problems,
            samples=preset.trace_samples,
            max_new_tokens=base.max_new_tokens,
            temperature=base.temperature,
            seed=seed,
            batch=base.eval_batch,
        )
        found.write(folder / TRACES_FILE)
    traces = Traces.read(folder / TRACES_FILE)
    if not (folder / "distilled" / SUMMARY_FILE).exists():
        learning = DistillSettings(
            model=preset.student,
            epochs=preset.distill_epochs,
            lr=preset.distill_lr,
            divergence=divergence,
            device=device,
            seed=seed,
        )
        shown = None if divergence is None else teacher()
        distill(learning, traces.examples(task), folder / "distilled", shown)
    distilled = str(folder / "distilled" / "model")
    reinforce("student", replace(base, model=distilled, cold_start_steps=0, steps=preset.student_steps))
    reinforce(
        "control",
        replace(base, model=preset.student, cold_start_until=preset.barely, steps=preset.control_steps),
    )
    if not (folder / MEASURED_FILE).exists():
        stages = ("zero", "r1", "distilled", "student", "control")
        summaries = {s: json.loads((folder / s / SUMMARY_FILE).read_text(encoding="utf-8")) for s in stages}
        measured = {
            "models": measure(folder, base, preset),
            "traces": {
                "kept": len(traces.kept),
                "sampled": traces.sampled,
                "right": traces.right,
                "seconds": traces.seconds,
                "corrections": asdict(count_corrections(text for _, text in traces.kept)),
            },
            "seconds": {stage: summary["seconds"] for stage, summary in summaries.items()},
            "recipe": recipe,
            "device": device_name(teacher().device),
            "versions": versions(),
        }
        write_json(folder / MEASURED_FILE, measured)
    return dict(json.loads((folder / MEASURED_FILE).read_text(encoding="utf-8")))


def _keep_to(file: Path, recipe: dict[str, Any]) -> None:
    """Write down what a folder's stages are made by; refuse to go on by anything else."""
    wanted = json.loads(json.dumps(recipe))  # as a file gives it back
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, wanted)
    begun = json.loads(file.read_text(encoding="utf-8"))
    for name in wanted:
        if begun.get(name) != wanted[name]:
            had, got = begun.get(name), wanted[name]
            if isinstance(had, dict) and isinstance(got, dict):  # name the settings that differ, not all of them
                keys = [key for key in {**had, **got} if had.get(key) != got.get(key)]
                had, got = ({key: which.get(key) for key in keys} for which in (had, got))
            raise ValueError(f"out: {file.parent} was begun with {name} = {had}, got {got}; want another folder")

"""The recipe of R1: its stages, that they resume, and that what is reported is what was measured."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from grpo_fast.train import checkpoint, distill, r1, r1_measure, traces
from grpo_fast.train.distill import DistillSettings
from grpo_fast.train.model import load_policy
from grpo_fast.train.r1 import run_r1
from grpo_fast.train.r1_measure import MODELS, lessons, without_thought
from grpo_fast.train.r1_presets import PRESETS, Preset
from grpo_fast.train.r1_report import write
from grpo_fast.train.rewards import format_reward
from grpo_fast.train.rollout import Rollout
from grpo_fast.train.settings import Settings
from grpo_fast.train.supervised import divergence_loss, supervised_loss, worked
from grpo_fast.train.tasks import Task, completion_text, load_task
from grpo_fast.train.trainer import RunStopped

STUDENT = DistillSettings(model="tiny-student", epochs=2, batch=4, save_every=3, device="cpu", seed=1)


#: Every stage in a second or two, and nothing learned.
MINUTE = Preset(
    teacher=Settings(
        model="tiny",
        task="checked_sum",
        cold_start_steps=2,
        cold_start_batch=8,
        cold_start_check=2,
        steps=2,
        prompts=4,
        group_size=2,
        max_new_tokens=12,
        eval_every=1,
        eval_problems=2,
        eval_samples=2,
        test_problems=2,
        save_every=1,
    ),
    student="tiny-student",
    trace_problems=4,
    student_steps=1,
    control_steps=2,
    problems=4,
    samples=2,
    level_problems=2,
    level_samples=1,
    levels={"easy": {"min_terms": 3, "max_terms": 3}, "longer": {"min_terms": 6, "max_terms": 6}},
)


@pytest.fixture
def right_teacher(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two steps teach nothing: the traces are the worked ones."""

    def collect(_: Any, task: Task, **options: Any) -> traces.Traces:
        kept = [(i, completion_text(task.problem("train", i))) for i in range(options["problems"])]
        return traces.Traces(kept, 8, 6, 6, 0.5)

    monkeypatch.setattr(r1, "collect", collect)


@pytest.mark.usefixtures("right_teacher")
def test_a_recipe_killed_in_every_stage_comes_to_the_same_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each stage fails once, having done all of its work but for the last file; the same command goes on."""
    whole = run_r1(tmp_path / "whole", MINUTE, device="cpu")
    stages = ("train", "collect", "distill", "measure")
    calls: list[str] = []

    def fail_after(name: str) -> Any:
        original = getattr(r1, name)

        def killed(*args: Any, **options: Any) -> Any:
            found = original(*args, **options)
            stage = args[1].name if name == "train" else name
            calls.append(stage)
            if calls.count(stage) > 1:
                return found
            if name in ("train", "distill"):
                ((args[1] if name == "train" else args[2]) / "summary.json").unlink()
            raise OSError("power cut")

        return killed

    for name in stages:
        monkeypatch.setattr(r1, name, fail_after(name))
    order = ["zero", "r1", "collect", "distill", "student", "control", "measure"]
    for _ in order:
        with pytest.raises(OSError, match="power cut"):
            run_r1(tmp_path / "run", MINUTE, device="cpu")
    measured = run_r1(tmp_path / "run", MINUTE, device="cpu")
    assert calls == [stage for stage in order for _ in range(2)]
    assert measured["models"] == whole["models"]
    assert run_r1(tmp_path / "run", MINUTE, device="cpu") == measured  # all read from files
    assert len(calls) == 2 * len(order)


@pytest.mark.usefixtures("right_teacher")
def test_all_stages_are_measured_and_reported(tmp_path: Path) -> None:
    measured = run_r1(tmp_path, MINUTE, device="cpu")
    assert measured["models"].keys() == MODELS.keys()
    sizes = {name: m["parameters"] for name, m in measured["models"].items()}
    assert 0.2 < sizes["distilled/model"] / sizes["r1/model"] < 0.35
    assert sizes["control/model"] == sizes["student/model"] == sizes["distilled/model"]
    write(tmp_path)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert page.count("data:image/png;base64,") == 2
    assert all(title in page for title in MODELS.values())
    assert "http" not in page  # it needs nothing beside it
    assert all(f"<th>{part}</th>" in page for part in ("rollout", "scoring", "loss", "optimizer"))
    assert measured["seconds"]["r1"].keys() >= {"rollout", "rewards", "loss", "optimizer"}
    for example in measured["models"]["r1/model"]["examples"]:
        assert example["reward"] == pytest.approx(
            example["right"] + 0.1 * format_reward([example["completion"]])[0]  # type: ignore[operator]
        )
    assert all((tmp_path / name).stat().st_size > 10_000 for name in ("training.png", "abilities.png"))


@pytest.mark.usefixtures("right_teacher")
def test_a_folder_begun_by_another_recipe_and_several_processes_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_r1(tmp_path, MINUTE, device="cpu")
    for message, preset, options in (
        ("was begun with seed = 0, got 1", MINUTE, {"seed": 1}),
        (r"was begun with divergence = None, got 0\.5", MINUTE, {"divergence": 0.5}),
        (r"was begun with teacher = {'steps': 2}, got {'steps': 3}", grown(), {}),
    ):
        with pytest.raises(ValueError, match=message):
            run_r1(tmp_path, preset, device="cpu", **options)  # type: ignore[arg-type]
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="r1: got 2 ranks, want one process"):
        run_r1(tmp_path, MINUTE, device="cpu")


def test_each_stage_starts_where_the_recipe_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What every stage is given, by recorders in the stages' places."""
    runs: dict[str, Settings] = {}
    asked: dict[str, Any] = {}
    learned: list[Any] = []

    def summarize(place: Path) -> None:
        place.mkdir(parents=True, exist_ok=True)
        checkpoint.write_json(place / "summary.json", {"seconds": {"total": 1.0}})

    def train(settings: Settings, place: Path, **_: Any) -> None:
        runs[place.name] = settings
        summarize(place)

    def collect(policy: Any, task: Task, **options: Any) -> traces.Traces:
        asked.update(options, policy=policy)
        return traces.Traces([(0, completion_text(task.problem("train", 0)))], 8, 6, 6, 0.5)

    def distilled(settings: DistillSettings, examples: Any, place: Path, teacher: Any) -> None:
        learned.extend((settings, teacher))
        summarize(place)

    for name, recorder in (("train", train), ("collect", collect), ("distill", distilled)):
        monkeypatch.setattr(r1, name, recorder)
    monkeypatch.setattr(r1, "measure", lambda *_: {})
    monkeypatch.setattr(
        r1, "load_policy", lambda name, device: SimpleNamespace(name=name, device=torch.device("cpu"))
    )
    preset = replace(MINUTE, barely=0.05)
    run_r1(tmp_path, preset, seed=3, device="cpu", divergence=0.5)
    teacher = preset.teacher
    found = {name: (s.model, s.cold_start_until, s.cold_start_steps, s.steps, s.seed) for name, s in runs.items()}
    assert found == {
        "zero": ("tiny", 0.05, 2, 2, 3),
        "r1": ("tiny", teacher.cold_start_until, 2, 2, 3),
        "student": (str(tmp_path / "distilled" / "model"), teacher.cold_start_until, 0, 1, 3),
        "control": ("tiny-student", 0.05, 2, 2, 3),
    }
    assert {name: s.language_weight for name, s in runs.items() if s.language_weight} == {"r1": 1.0}
    assert asked["policy"].name == str(tmp_path / "r1" / "model")
    assert asked["first"] == 2 * 8 + 2 * 4  # problems that the teacher has not been trained on
    settings, shown = learned
    assert (settings.model, settings.divergence, settings.seed) == ("tiny-student", 0.5, 3)
    assert shown.name == str(tmp_path / "r1" / "model")
    recipe = json.loads((tmp_path / "recipe.json").read_text(encoding="utf-8"))
    assert recipe["seed"] == 3
    assert recipe["teacher"].keys().isdisjoint({"seed", "device"})


def test_models_are_measured_on_problems_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same held-out ones whatever the run's seed, of the split no choice was made by, and level by level."""
    calls: list[tuple[list[str], str, int]] = []

    def evaluate(_: Any, task: Task, split: Any, **options: Any) -> Any:
        calls.append(([p.compact for p in task.problems(split, 0, 3)], split, options["problems"]))
        return Measured(0.5, 0.1, [])

    monkeypatch.setattr(r1_measure, "evaluate", evaluate)
    monkeypatch.setattr(r1_measure, "without_thought", lambda *_: (0.0, 0.0))
    policy = SimpleNamespace(model=torch.nn.Linear(1, 1))
    monkeypatch.setattr(r1_measure, "load_policy", lambda *_, **__: policy)
    base = replace(MINUTE.teacher, seed=5)
    r1_measure.measure(tmp_path, base, MINUTE)
    held_out = [base.load_task(seed=r1_measure.HELD_OUT_SEED, **o) for o in ({}, *MINUTE.levels.values())]
    expected = [[p.compact for p in task.problems("test", 0, 3)] for task in held_out]
    assert len({str(problems) for problems in expected}) == 3
    sizes = (MINUTE.problems, MINUTE.level_problems, MINUTE.level_problems)
    assert calls == [(p, "test", n) for p, n in zip(expected, sizes, strict=True)] * len(MODELS)


@dataclass
class Measured:
    pass_at_1: float
    pass_at_1_se: float
    examples: list[dict[str, Any]]


def grown() -> Preset:
    return replace(MINUTE, teacher=replace(MINUTE.teacher, steps=3))


@pytest.mark.parametrize("preset", PRESETS.values(), ids=PRESETS)
def test_a_preset_fits_its_task_and_its_models(preset: Preset) -> None:
    task, policy = preset.teacher.load_task(), load_policy(preset.student, device="cpu")
    lengths = [len(policy.completion(completion_text(p))) for p in task.problems("train", 0, 300)]
    assert sum(length > preset.teacher.max_new_tokens for length in lengths) <= 3
    assert preset.samples >= 64
    for options in preset.levels.values():
        assert preset.teacher.load_task(**options).problem("test", 0)


def test_only_right_and_well_formed_traces_are_kept_each_once(monkeypatch: pytest.MonkeyPatch) -> None:
    task = load_task("chain_sum")
    policy = load_policy("tiny", device="cpu")
    first, second = task.problems("train", 10, 2)
    right = completion_text(first)
    answers = [right, right, right.replace("<think>", ""), f"<think></think><answer>{first.answer}</answer>"]
    answers += [completion_text(second), right, "", f"<think>x</think><answer>{second.answer}0</answer>"]
    empty = torch.zeros(8, 1)
    monkeypatch.setattr(
        traces, "sample", lambda *_, **__: Rollout(empty, empty, empty, empty, empty, answers, empty.bool())
    )
    found = traces.collect(policy, task, first=10, problems=2, samples=4, max_new_tokens=8, temperature=1.0, seed=0)
    wanted = {(10, right), (10, answers[3]), (11, answers[4])}
    if task.verify(first.answer, second):  # then the first problem's answer is right for the second too
        wanted.add((11, right))
    assert set(found.kept) == wanted
    assert len(found.kept) == len(wanted)
    assert (found.sampled, found.right >= 5, found.well_formed) == (8, True, 6)
    assert next(problem.answer for problem, _ in found.examples(task)) == first.answer


def test_traces_survive_writing(tmp_path: Path) -> None:
    found = traces.Traces([(3, "<think>a</think>"), (4, "b")], 8, 5, 6, 1.5)
    found.write(tmp_path / "traces.json")
    assert traces.Traces.read(tmp_path / "traces.json") == found
    assert [file.name for file in tmp_path.iterdir()] == ["traces.json"]


@pytest.mark.parametrize("step", [2, 3, 5])
def test_distillation_that_was_stopped_is_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    examples = worked(load_task("chain_sum").problems("train", 0, 10))  # the last batch of an epoch has 2
    whole = distill.distill(STUDENT, examples, tmp_path / "whole")
    assert whole["steps"] == 6
    calls = []

    def interrupt(*args: Any) -> torch.Tensor:
        calls.append(args)
        if len(calls) == step:
            os.kill(os.getpid(), signal.SIGINT)
        return supervised_loss(*args)

    monkeypatch.setattr(distill, "supervised_loss", interrupt)
    with pytest.raises(RunStopped):
        distill.distill(STUDENT, examples, tmp_path / "run")
    monkeypatch.undo()
    again = distill.distill(STUDENT, examples, tmp_path / "run")
    assert (again["steps"], again["tokens"]) == (whole["steps"], whole["tokens"])
    models = [checkpoint.load_file(tmp_path / name / "model" / "model.safetensors") for name in ("run", "whole")]
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[1])
    rows = [(tmp_path / name / "metrics.jsonl").read_text() for name in ("run", "whole")]
    assert rows[0] == rows[1]


def test_a_student_learns_what_it_is_shown(tmp_path: Path) -> None:
    examples = worked(load_task("chain_sum").problems("train", 0, 8))
    settings = DistillSettings(model="tiny-student", epochs=60, batch=8, lr=5e-3, device="cpu")
    distill.distill(settings, examples, tmp_path / "run")
    losses = [json.loads(line)["loss"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert losses[-1] < 0.3 * losses[0]
    assert load_policy(str(tmp_path / "run" / "model"), device="cpu").model.config.hidden_size == 64
    with pytest.raises(ValueError, match="examples: got none"):
        distill.distill(settings, [], tmp_path / "none")


def test_a_divergence_brings_the_student_to_the_teachers_distribution(tmp_path: Path) -> None:
    """More than the traces alone do, which say nothing of what else the teacher holds possible."""
    teacher = load_policy("tiny", device="cpu", seed=3)
    teacher.model.eval().requires_grad_(False)
    examples = worked(load_task("chain_sum").problems("train", 0, 8))
    gaps = []
    for divergence in (None, 0.0, 0.5, 1.0):
        folder = tmp_path / str(divergence)
        settings = DistillSettings(model="tiny-student", divergence=divergence, epochs=40, batch=8, device="cpu")
        distill.distill(settings, examples, folder, teacher)
        student = load_policy(str(folder / "model"), device="cpu")
        with torch.no_grad():
            gaps.append(
                (divergence_loss(student, teacher, examples, 0.0) - supervised_loss(student, examples)).item()
            )
    assert max(gaps[1:]) < 0.9 * gaps[0]
    with pytest.raises(ValueError, match=r"divergence: got 0\.5 without a teacher"):
        distill.distill(DistillSettings(model="tiny-student", divergence=0.5), examples, tmp_path / "none")


def test_without_a_thought_the_answer_follows_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    task, policy = load_task("chain_sum"), load_policy("tiny", device="cpu")
    problems = task.problems("test", 0, 2)
    asked = []

    def answer(_: Any, prompts: list[list[int]], **options: Any) -> Rollout:
        asked.extend(policy.decode(torch.tensor(prompt)) for prompt in prompts)
        empty = torch.zeros(2, 1)
        texts = [f"{problems[0].answer}</answer>", "nothing"]
        return Rollout(empty, empty, empty, empty, empty, texts, empty.bool())

    monkeypatch.setattr(r1_measure, "sample", answer)
    share, _ = without_thought(policy, task, problems)
    assert share == 0.5
    assert asked == [f"{problem.compact}{r1_measure.NO_THOUGHT}" for problem in problems]


def test_a_lesson_holds_only_beyond_two_standard_errors() -> None:
    def model(title: str, accuracy: float, error: float = 0.02) -> dict[str, Any]:
        rest = {"greedy": 0.8, "problems": 200, "without_thought": (0.2, 0.03)}
        rest["corrections"] = {"steps": 900, "slips": 100, "noticed": 70, "repaired": 66, "false_alarms": 3}
        return {"title": title, "pass_at_1": accuracy, "pass_at_1_se": error, **rest}

    accuracy = dict(zip(MODELS, (0.1, 0.5, 0.45, 0.8, 0.6, 0.64, 0.3), strict=True))
    models = {name: model(name, value) for name, value in accuracy.items()}
    assert [holds for _, holds, _ in lessons(models)] == [True, True, True, True, True, False]
    assert "+30.0 ± 2.8 points" in lessons(models)[4][2]
    assert "after 70.0% of 100 wrong steps and 0.4% of 800 right ones; 66 of 70" in lessons(models)[1][2]
    for slips, noticed in ((100, 3), (0, 0)):  # 3 of 100 and 3 of 800 are within two standard errors of each other
        models["r1/model"]["corrections"] |= {"slips": slips, "noticed": noticed}
        assert not lessons(models)[1][1]

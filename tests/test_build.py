"""setup.py: what it reads of the environment, what it builds with nvcc and without, what sdist and wheel hold."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from types import ModuleType

import pytest

from grpo_fast import backend

ROOT = Path(__file__).parents[1]
if not (ROOT / "setup.py").is_file():
    pytest.skip("these tests are for a checkout or an sdist", allow_module_level=True)


def _load_setup() -> ModuleType:
    spec = importlib.util.spec_from_file_location("grpo_fast_setup", ROOT / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for it
    spec.loader.exec_module(module)
    return module


build = _load_setup()
NVCC = build.find_nvcc(os.environ)[0]
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="no nvcc on this machine")

# A toolkit that answers what it is asked, and compiles nothing.
FAKE_NVCC = """#!/bin/sh
case "$*" in
  --version) echo "Cuda compilation tools, release {version}, V{version}.1" ;;
  --list-gpu-code) printf 'sm_80\\nsm_89\\nsm_90\\n' ;;
  --dryrun*) printf '#$ _TARGET_DIR_=targets/some-linux\\n#$ TOP={top}/bin/..\\n' >&2 ;;
  *) echo "fill.cu(1): error: this one cannot compile"; exit 1 ;;
esac
"""


def fake_toolkit(top: Path, version: str = "12.4") -> Path:
    """A folder to point CUDA_HOME at."""
    (top / "bin").mkdir(parents=True)
    nvcc = top / "bin" / "nvcc"
    nvcc.write_text(FAKE_NVCC.format(version=version, top=top))
    nvcc.chmod(0o755)
    return top


# --- What the environment says -------------------------------------------------------------------------------------


def test_grpo_fast_cuda() -> None:
    assert build.requested({}) == "auto"
    assert [build.requested({"GRPO_FAST_CUDA": value}) for value in ("auto", "1", "0")] == ["auto", "1", "0"]
    for value in ("yes", "", "AUTO"):
        with pytest.raises(build.BuildError, match=f"GRPO_FAST_CUDA: got {value!r}, want auto, 1 or 0"):
            build.requested({"GRPO_FAST_CUDA": value})


def test_where_nvcc_is_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home, path, default = (fake_toolkit(tmp_path / name) for name in ("home", "path", "default"))
    monkeypatch.setattr(build, "DEFAULT_TOOLKIT", default)
    both = {"CUDA_PATH": str(home), "PATH": str(path / "bin")}
    assert build.find_nvcc(both)[0] == str(home / "bin/nvcc")
    assert build.find_nvcc({**both, "CUDA_HOME": str(default)})[0] == str(default / "bin/nvcc")
    assert build.find_nvcc({"PATH": str(path / "bin"), "CUDA_HOME": ""})[0] == str(path / "bin/nvcc")
    assert build.find_nvcc({"PATH": "/nowhere"})[0] == str(default / "bin/nvcc")
    # A toolkit that is named and not there is not replaced by another one in silence.
    assert build.find_nvcc({**both, "CUDA_HOME": "/none"}) == (None, "/none/bin/nvcc (from CUDA_HOME)")
    assert "/none/bin/nvcc" in build.missing({**both, "CUDA_HOME": "/none"})
    shutil.rmtree(default)
    assert build.find_nvcc({"PATH": "/nowhere"})[0] is None
    for name in ("CUDA_HOME", "CUDA_PATH", "PATH", str(default)):
        assert name in build.missing({"PATH": "/nowhere"})


@pytest.mark.parametrize(
    ("include", "library"), [("targets/some-linux/include", "targets/some-linux/lib"), ("include", "lib64")]
)
def test_a_toolkit_is_found_from_a_wrapper_elsewhere(tmp_path: Path, include: str, library: str) -> None:
    top = fake_toolkit(tmp_path / "cuda")
    for file in (f"{include}/cuda_runtime_api.h", f"{include}/cccl/cuda", f"{library}/libcudart_static.a"):
        (top / file).parent.mkdir(parents=True, exist_ok=True)
        (top / file).touch()
    wrapper = tmp_path / "nvcc"
    wrapper.write_text(f'#!/bin/sh\nexec {top}/bin/nvcc "$@"\n')
    wrapper.chmod(0o755)
    toolkit = build.load_toolkit(str(wrapper))
    assert (toolkit.version, toolkit.codes) == ("12.4", {"sm_80", "sm_89", "sm_90"})
    assert toolkit.includes == (top / include, top / include / "cccl")
    assert toolkit.libraries == (top / library,)


def test_a_toolkit_that_is_no_use(tmp_path: Path) -> None:
    old = fake_toolkit(tmp_path / "old", version="11.8") / "bin" / "nvcc"
    with pytest.raises(build.BuildError, match=r"got CUDA 11.8, want CUDA 12.0 or newer"):
        build.load_toolkit(str(old))
    old.write_text("#!/bin/sh\necho no licence\nexit 3\n")
    with pytest.raises(build.BuildError, match="nvcc --version failed:\nno licence"):
        build.load_toolkit(str(old))


# --- Architectures -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("8.0", "80"),
        ("8.0;9.0a 10.0+PTX", "80 90a 100+PTX"),
        ("8.6, 9.0;", "86 90a"),
        ("9.0 9.0a+PTX", "90a+PTX"),
        ("9.0+PTX;9.0a", "90a+PTX"),
        ("10.3f 12.1a", "103f 121a"),
    ],
)
def test_architectures_are_parsed(text: str, names: str) -> None:
    assert build.parse_architectures(text) == names.split()


@pytest.mark.parametrize("item", ["Hopper", "90", "9.0b", "9.0+ptx", "sm_90", "all"])
def test_what_is_no_architecture(item: str) -> None:
    with pytest.raises(build.BuildError) as raised:
        build.parse_architectures(f"8.0 {item}")
    assert f"TORCH_CUDA_ARCH_LIST: got {item!r}" in str(raised.value)


def test_architectures_are_those_that_nvcc_knows(capsys: pytest.CaptureFixture[str]) -> None:
    def names(codes: str, listed: str | None = None) -> str:
        toolkit = build.Toolkit("nvcc", "12.4", frozenset(codes.split()), (), ())
        environ = {} if listed is None else {"TORCH_CUDA_ARCH_LIST": listed}
        return " ".join(build.architectures(environ, toolkit))

    assert names("sm_80 sm_90 sm_100 sm_120") == names("sm_80 sm_90 sm_100", " ") == "80 90a 100+PTX"
    assert capsys.readouterr().out == ""
    assert names("sm_80 sm_90") == "80 90a+PTX"
    assert capsys.readouterr().out == "grpo_fast: no code for 100, which nvcc 12.4 does not know\n"
    assert names("sm_75 sm_80 sm_90", "7.5 8.0") == "80"
    assert capsys.readouterr().out == "grpo_fast: no code for 75: the kernels want 8.0 or newer\n"
    with pytest.raises(build.BuildError, match=r"got '7\.5', want 8\.0 or newer in it"):
        names("sm_75 sm_80", "7.5")
    with pytest.raises(build.BuildError, match="got 100, but nvcc knows sm_80, sm_90"):
        names("sm_80 sm_90", "9.0 10.0")


def test_gencode() -> None:
    assert build.gencode("80") == ["-gencode", "arch=compute_80,code=sm_80"]
    assert build.gencode("90a+PTX") == [
        *("-gencode", "arch=compute_90a,code=sm_90a"),
        *("-gencode", "arch=compute_90,code=compute_90"),
    ]


def test_max_jobs() -> None:
    assert build.jobs({"MAX_JOBS": "3"}) == 3
    assert build.jobs({}) >= 1
    for value in ("0", "-1", "many"):
        with pytest.raises(build.BuildError, match=f"MAX_JOBS: got {value!r}"):
            build.jobs({"MAX_JOBS": value})


# --- Whole builds, without build isolation -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An sdist of a copy of this tree, unpacked."""
    ignored = (".*", "build", "dist", "runs", "*.egg-info", "*.so", "__pycache__")
    tree = tmp_path_factory.mktemp("tree") / "grpo_fast"
    shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns(*ignored))
    shutil.copy(ROOT / ".clang-format", tree)
    done = run_backend("build_sdist", tree)
    assert done.returncode == 0, done.stderr
    (archive,) = (tree / "dist").glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(tree.parent, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    return tree.parent / archive.name.removesuffix(".tar.gz")


def run_backend(hook: str, tree: Path, **environ: str) -> subprocess.CompletedProcess[str]:
    """Run a hook of the build backend as pip does, into tree/dist."""
    kept = {name: value for name, value in os.environ.items() if name not in ("GRPO_FAST_CUDA", "MAX_JOBS")}
    code = f"from setuptools import build_meta; build_meta.{hook}('dist')"
    (tree / "dist").mkdir(exist_ok=True)
    return subprocess.run(
        [sys.executable, "-c", code], cwd=tree, env={**kept, **environ}, capture_output=True, text=True
    )


def wheel_names(tree: Path, wheel: str) -> set[str]:
    (path,) = (tree / "dist").glob(wheel)
    names = set(zipfile.ZipFile(path).namelist())
    path.unlink()
    return {name for name in names if ".dist-info/" not in name}


def test_the_sdist_is_complete(sdist: Path) -> None:
    suffixes = {".py", ".cu", ".cuh", ".cpp", ".h", ".md", ".png", ".svg", ".json", ".txt", ".toml", ".typed"}
    folders = ("grpo_fast", "kernels", "csrc", "tests", "benchmarks", "docs", "examples")
    files = (file for folder in folders for file in (ROOT / folder).rglob("*") if file.suffix in suffixes)
    wanted = {"LICENSE", "Makefile", "README.md", "CONTRIBUTING.md", "MANIFEST.in", "pyproject.toml", "setup.py"}
    wanted.add(".clang-format")  # make test asks for it
    wanted |= {str(file.relative_to(ROOT)) for file in files}
    held = {str(file.relative_to(sdist)) for file in sdist.rglob("*") if file.is_file()}
    assert wanted <= held, wanted - held
    assert not any(name.endswith((".so", ".o", ".pyc")) for name in held)


PYTHON_FILES = {
    *(f"grpo_fast/{file.relative_to(ROOT / 'grpo_fast')}" for file in (ROOT / "grpo_fast").rglob("*.py")),
    *(f"grpo_fast/kernels/{file.name}" for file in (ROOT / "kernels" / "triton").glob("*.py")),
    *(f"grpo_fast/benchmarks/{file.name}" for file in (ROOT / "benchmarks").glob("*.py")),
    "grpo_fast/_C.pyi",
    "grpo_fast/py.typed",
}


@pytest.mark.parametrize(
    ("environ", "why"),
    [
        ({"GRPO_FAST_CUDA": "0"}, "GRPO_FAST_CUDA=0; unset it to change that"),
        ({"CUDA_HOME": "/none"}, "no nvcc in /none/bin/nvcc (from CUDA_HOME); set CUDA_HOME to a CUDA toolkit"),
    ],
    ids=["0", "auto"],
)
def test_without_the_extension_the_wheel_is_pure_and_the_build_says_so(
    sdist: Path, environ: dict[str, str], why: str
) -> None:
    done = run_backend("build_wheel", sdist, **environ)
    assert done.returncode == 0, done.stderr
    assert wheel_names(sdist, "*-py3-none-any.whl") == PYTHON_FILES
    said = [line for line in done.stdout.splitlines() if line.startswith("grpo_fast:")]
    assert said == [f"grpo_fast: no CUDA extension, Triton kernels only: {why}"]


def test_a_missing_nvcc_is_an_error_if_one_is_asked_for(sdist: Path) -> None:
    done = run_backend("build_wheel", sdist, GRPO_FAST_CUDA="1", CUDA_HOME="/none")
    assert done.returncode == 1
    assert done.stderr.strip().endswith(
        "GRPO_FAST_CUDA=1, but no nvcc in /none/bin/nvcc (from CUDA_HOME); set CUDA_HOME to a CUDA toolkit"
    )


def test_a_failed_compile_is_an_error(sdist: Path, tmp_path: Path) -> None:
    home = fake_toolkit(tmp_path / "cuda")
    done = run_backend("build_wheel", sdist, CUDA_HOME=str(home), TORCH_CUDA_ARCH_LIST="9.0")
    assert done.returncode == 1
    assert "error: this one cannot compile" in done.stdout
    assert done.stderr.strip().endswith("GRPO_FAST_CUDA=0 installs without it")
    assert not list((sdist / "dist").glob("*.whl"))


@needs_nvcc
def test_the_wheel_with_the_extension(sdist: Path) -> None:
    environ = {"GRPO_FAST_CUDA": "1", "TORCH_CUDA_ARCH_LIST": "9.0"}
    done = run_backend("build_wheel", sdist, **environ)
    assert done.returncode == 0, done.stdout + done.stderr
    (library,) = (sdist / "build").glob("lib.*/grpo_fast/_C.*.so")
    assert wheel_names(sdist, "*-linux_*.whl") == {*PYTHON_FILES, f"grpo_fast/{library.name}"}
    code = "import _C; print(_C.architectures)"  # a process of its own: this one may hold the installed extension
    done = subprocess.run([sys.executable, "-c", code], cwd=library.parent, capture_output=True, text=True)
    assert done.stdout == "90a\n", done.stderr
    symbols = subprocess.run(["nm", "-D", "--defined-only", library], capture_output=True, text=True, check=True)
    assert "PyInit__C" in symbols.stdout
    assert "cudaLaunchKernel" not in symbols.stdout  # it would get mixed up with the runtime that torch brings

    assert "ninja: no work to do" in run_backend("build_wheel", sdist, **environ).stdout
    for header in (sdist / "csrc").glob("*.cuh"):  # depfiles tell who includes them
        header.write_text(header.read_text() + '\nstatic_assert(false, "touched");\n')
    assert "touched" in run_backend("build_wheel", sdist, **environ).stdout


@pytest.mark.skipif(
    NVCC is None or os.environ.get("GRPO_FAST_CUDA") == "0", reason="no nvcc on this machine, or GRPO_FAST_CUDA=0"
)
def test_what_is_installed_has_the_extension() -> None:
    assert backend.EXTENSION is not None, backend.WHY_NO_EXTENSION
    names = backend.EXTENSION.architectures.split()
    assert names
    for name in names:
        backend._serves(name, (9, 0))  # can be read
    major, minor = backend.EXTENSION.cuda_version.split(".")
    assert (int(major), int(minor)) >= build.OLDEST_CUDA

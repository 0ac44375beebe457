"""Label smoothing over a chunk of logits, for the linear ops.

With smoothing s the log-prob of a label becomes (1 - s) logp + s times the mean log-prob of the vocabulary, which is
logp minus s times what the label's logit has above the mean of its row: a term that needs no softmax.
"""

from __future__ import annotations

from torch import Tensor


def above_mean(logits: Tensor, index: Tensor) -> Tensor:
    """(n,): by how much the logit at ``index`` (n,) is above the mean of its row of ``logits`` (n, V)."""
    return logits.gather(1, index.unsqueeze(1)).squeeze(1) - logits.mean(1)


def add_gradient_above_mean(gradient: Tensor, index: Tensor, factor: Tensor) -> None:
    """Add ``factor`` (n,) times the derivative of ``above_mean`` to the gradient of the logits (n, V)."""
    gradient -= (factor / gradient.size(1)).unsqueeze(1)
    index = index.unsqueeze(1)
    gradient.scatter_(1, index, gradient.gather(1, index) + factor.unsqueeze(1).to(gradient.dtype))


def as_address(index: Tensor, vocabulary: int) -> Tensor:
    """``index`` within the vocabulary; the log-prob of what is not is NaN already."""
    return index.long().clamp(0, vocabulary - 1)

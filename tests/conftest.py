"""Without a GPU, Triton's kernels run in its interpreter; it must be told before it is imported."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

#: The implementations with kernels that can run here; on a GPU all of them have to.
KERNELS = ("triton", "cuda") if torch.cuda.is_available() else ("triton",)


@pytest.fixture(params=KERNELS)
def impl(request: pytest.FixtureRequest) -> str:
    """Each implementation with kernels, in turn."""
    return str(request.param)

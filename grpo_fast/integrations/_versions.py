"""Which versions of another library an integration is written for."""

from __future__ import annotations

import importlib.metadata


def require(package: str, *, oldest: str, below: str) -> None:
    """Check that ``package`` is installed in a version of at least ``oldest`` and less than ``below``.

    Raises:
        ImportError: It is not; the message has the range.
    """
    supported = f"grpo_fast's integration supports {package}>={oldest},<{below}"
    try:
        installed = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError as error:
        raise ImportError(f"{package} is not installed; {supported}") from error
    if not _numbers(oldest) <= _numbers(installed) < _numbers(below):
        raise ImportError(f"{package} {installed} is installed; {supported}")


def _numbers(version: str) -> tuple[int, ...]:
    """1.16.0.dev0 -> (1, 16)."""
    return tuple(int(part) for part in version.split(".")[:2])

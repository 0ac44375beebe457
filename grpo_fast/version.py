"""The version, alone in a file so that a build reads it without importing torch, and the commit."""

import os
import subprocess
from pathlib import Path

__version__ = "0.1.0"


def commit() -> str:
    """The commit that a checkout is at, "unknown" without one; ``$GRPO_FAST_COMMIT`` says it of a bare copy."""
    root = Path(__file__).resolve().parents[1]
    given = os.environ.get("GRPO_FAST_COMMIT", "")
    if given or not (root / ".git").exists():  # an installed package may lie in somebody else's checkout
        return given or "unknown"
    try:
        command = ["git", "-C", str(root), "rev-parse", "--short", "HEAD"]
        return subprocess.run(command, capture_output=True, text=True).stdout.strip() or "unknown"
    except OSError:
        return "unknown"

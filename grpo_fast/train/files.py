"""Files that are whole or not there: written under a temporary name, then renamed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def write_file(path: Path, content: str | bytes) -> None:
    """Write text, as UTF-8, or bytes."""
    partial = path.with_name(f"{path.name}.partial")
    partial.write_bytes(content.encode() if isinstance(content, str) else content)
    partial.replace(path)


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as JSON."""
    write_file(path, json.dumps(value, indent=1) + "\n")

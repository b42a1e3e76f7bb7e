"""What weights are known by, wherever they lie."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_PIECES, _PIECE = 16, 4096  # how many pieces of how many bytes a file of weights is known by


def weights_fingerprint(model: str) -> str:
    """A model directory's or a checkpoint's, the same wherever it lies; "" for a hub name.

    Read are config.json and pieces spread over each file of weights: training moves every weight, so that two steps of
    one run differ in each of them, and the price is the same for every size of model.
    """
    folder = Path(model)
    if not folder.is_dir():
        return ""
    patterns = ("config.json", "*.safetensors", "*.bin", "hf/config.json", "state/*")
    files = sorted(path for pattern in patterns for path in folder.glob(pattern) if path.is_file())
    found = hashlib.sha256()
    for path in files:
        size = path.stat().st_size
        found.update(f"{path.relative_to(folder)} {size} ".encode())
        with path.open("rb") as file:
            for number in range(_PIECES):
                file.seek(max(0, size - _PIECE) * number // (_PIECES - 1))
                found.update(file.read(_PIECE))
    return found.hexdigest()[:16]


def named(path: str, fingerprint: str) -> str:
    """A path with what lies there; two are the same where that is, whatever the path."""
    return f"{path} [{fingerprint}]" if fingerprint else path


def content(value: Any) -> Any:
    """What results were made of, without the paths at which it lay."""
    if isinstance(value, Mapping):
        return {name: content(one) for name, one in value.items()}
    if isinstance(value, list):
        return [content(one) for one in value]
    if isinstance(value, str) and value.endswith("]"):
        return value.rpartition(" [")[2]
    return value

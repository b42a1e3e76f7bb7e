"""What results were made of, so that those of one model are not taken for another's."""

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


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What two results were made of otherwise, as `name: before -> now`."""
    return [
        f"{name}: {_shown(before.get(name))} -> {_shown(now.get(name))}"
        for name in {**before, **now}
        if _content(before.get(name)) != _content(now.get(name))
    ]


def _shown(value: Any) -> str:
    return " ".join(map(str, value)) or "none" if isinstance(value, list) else str(value)


def _content(value: Any) -> Any:
    if isinstance(value, list):
        return [_content(one) for one in value]
    if isinstance(value, str) and value.endswith("]"):
        return value.rpartition(" [")[2]
    return value

"""What results were made of, so that those of one model are not taken for another's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from checkpoint_tools.fingerprint import weights_fingerprint as weights_fingerprint


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

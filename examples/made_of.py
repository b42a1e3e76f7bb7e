"""What results were made of, so that those of one model are not taken for another's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from checkpoint_tools.fingerprint import content
from checkpoint_tools.fingerprint import named as named
from checkpoint_tools.fingerprint import weights_fingerprint as weights_fingerprint


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What two results were made of otherwise, as `name: before -> now`."""
    return [
        f"{name}: {_shown(before.get(name))} -> {_shown(now.get(name))}"
        for name in {**before, **now}
        if content(before.get(name)) != content(now.get(name))
    ]


def _shown(value: Any) -> str:
    return " ".join(map(str, value)) or "none" if isinstance(value, list) else str(value)

"""FlashAttention 3 stands behind torch's kernel where it is offered, and a broken one stops nobody."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from torch.nn import attention

from models import backend


@pytest.fixture
def hopper(monkeypatch):
    """A Hopper GPU with the package, as far as can be asked; returns what was activated."""
    activated = []
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if name == "flash_attn_interface" else None)
    monkeypatch.setattr(attention, "list_flash_attention_impls", lambda: ["FA3", "FA4"], raising=False)
    monkeypatch.setattr(attention, "activate_flash_attention_impl", activated.append, raising=False)
    return activated


def test_it_is_activated_once_asked(hopper):
    assert backend.activate_flash_attention_3(deterministic=False) and hopper == ["FA3"]


def test_runs_that_must_repeat_do_without(hopper):
    assert not backend.activate_flash_attention_3(deterministic=True) and hopper == []


def test_other_gpus_and_older_torch_do_without(hopper, monkeypatch):
    monkeypatch.setattr(attention, "list_flash_attention_impls", list, raising=False)
    assert not backend.activate_flash_attention_3(deterministic=False)
    monkeypatch.undo()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (10, 0))
    assert not backend.activate_flash_attention_3(deterministic=False) and hopper == []


def test_a_package_that_does_not_import_stops_nobody(hopper, monkeypatch):
    def broken(name):
        raise RuntimeError("Module does not expose FA3 kernels")

    monkeypatch.setattr(attention, "activate_flash_attention_impl", broken)
    assert not backend.activate_flash_attention_3(deterministic=False)

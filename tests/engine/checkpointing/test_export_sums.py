"""A flipped byte and a cut tail in every file of an exported model are named before it is trained again."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from checkpoint_tools import hf_to_mcore, mcore_to_hf
from checkpoint_tools.verify import verify_path
from data.checksums import SUMS, text_sum
from engine.base_model import find_base_model, weight_reader
from engine.checkpointing.export_sums import LIST
from models.conversion.hf_reader import INDEX, SINGLE
from tests.support.chatting import small_tokenizer
from tests.support.tiny import save_model


@pytest.fixture(scope="module")
def export(tmp_path_factory) -> Path:
    """A model in several files with a tokenizer, through a checkpoint and out again."""
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("export")
    whole = save_model("llama", folder / "whole", dtype=torch.bfloat16, layers=1)
    AutoModelForCausalLM.from_pretrained(whole).save_pretrained(folder / "source", max_shard_size="60KB")
    small_tokenizer().save_pretrained(folder / "source")
    hf_to_mcore.main(hf=folder / "source", output=folder / "checkpoint", num_workers=1)
    mcore_to_hf.main(checkpoint=folder / "checkpoint", output=folder / "export", num_workers=2)
    return folder / "export"


def read_all(folder: Path) -> None:
    """Reads a model as a run does."""
    base = find_base_model(str(folder))
    base.check()
    read = weight_reader(base)
    for rule in base.description.rules:
        read(rule.key, (0,) * len(rule.shape), rule.shape)


def damaged(path: Path) -> Iterator[str]:
    """Damages a file in one way after the other, and leaves it whole."""
    content = path.read_bytes()
    for place in {0, 9, len(content) // 3, len(content) // 2, len(content) - 1}:
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        yield f"byte {place} flipped"
    for length in (len(content) - 1, len(content) // 2):
        path.write_bytes(content[:length])
        yield f"cut to {length}"
    path.write_bytes(content)


def test_every_flip_and_every_cut_is_named(export, tmp_path, capsys):
    folder = shutil.copytree(export, tmp_path / "model")
    read_all(folder)
    assert verify_path(folder) == 0 and "is intact" in capsys.readouterr().out
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    weights = [path for path in files if path.suffix == ".safetensors"]
    assert len(weights) > 1 and all(path.with_name(path.name + SUMS) in files for path in weights)
    assert {INDEX, "config.json", "tokenizer.json", LIST} <= {path.name for path in files}
    for path in files:
        for what in damaged(path):
            with pytest.raises(ValueError) as caught:
                read_all(folder)
            assert path.name in str(caught.value), (what, str(caught.value))
            assert verify_path(folder) == 1, (path.name, what)
            assert path.name in capsys.readouterr().out, (path.name, what)
    read_all(folder)


def test_damage_does_not_travel_into_a_checkpoint(export, tmp_path):
    folder = shutil.copytree(export, tmp_path / "model")
    path = sorted(folder.glob("*.safetensors"))[0]
    content = bytearray(path.read_bytes())
    content[-7] ^= 64
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"{path.name} is damaged: its bytes 0 to"):
        hf_to_mcore.main(hf=folder, output=tmp_path / "checkpoint", num_workers=1)
    assert not (tmp_path / "checkpoint").exists()


def test_a_file_that_a_user_changed_is_named_with_the_mend(export, tmp_path):
    folder = shutil.copytree(export, tmp_path / "model")
    with open(folder / "config.json", "a") as file:
        file.write("\n")
    with pytest.raises(ValueError, match=rf"config.json is damaged: .*; if you changed it yourself, remove .*{LIST}"):
        find_base_model(str(folder))
    (folder / LIST).unlink()
    read_all(folder)


def test_checksums_name_no_file_outside_the_directory(export, tmp_path):
    folder = shutil.copytree(export, tmp_path / "model")
    sums = {"../secret": "0" * 16}
    content = {"files": sums, "checksum": text_sum(json.dumps(sums, sort_keys=True))}
    (folder / LIST).write_text(json.dumps(content) + "\n")
    with pytest.raises(ValueError, match="names a file outside its directory: ../secret"):
        find_base_model(str(folder))


def test_directories_of_others_have_none(tmp_path):
    save_model("llama", tmp_path, layers=1)
    read_all(tmp_path)
    assert not list(tmp_path.glob(f"*{SUMS}")) and (tmp_path / SINGLE).exists()

"""Directories as people have them: what of them is not taken up is what transformers does not take up, and is said."""

from __future__ import annotations

import contextlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from checkpoint_tools.hf_to_mcore import main as to_mcore
from data.preparation.tokenizer import load_tokenizer
from engine.base_model import find_base_model
from engine.checkpointing.model_files import check_tokenizers
from models.conversion.hf_reader import INDEX, SINGLE, HFReader, copy_side_files, ignored_files
from models.families.common import IGNORED_FIELDS
from models.hf_config import describe, read_config
from models.model_directory import check_directory, model_notes, open_reader, weights_dtype
from tests.support.loading import in_memory
from tests.support.tiny import MODELS, save_model

BUFFERS = ("model.layers.0.self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq")


def edit_config(folder: Path, **fields) -> None:
    (folder / "config.json").write_text(json.dumps(read_config(folder) | fields))


@pytest.mark.parametrize("name", MODELS)
def test_rotary_buffers_of_any_dtype_are_left_out_and_said(tmp_path, name):
    save_model(name, tmp_path, dtype=torch.bfloat16, layers=1)
    tensors = load_file(tmp_path / SINGLE)
    save_file(tensors | {key: torch.ones(8) for key in BUFFERS}, tmp_path / SINGLE, metadata={"format": "pt"})
    base = find_base_model(str(tmp_path))
    base.check()
    assert base.dtype == "bfloat16"
    assert base.notes == (
        f"2 tensor(s) left out (copies or computed buffers), as transformers does: {', '.join(BUFFERS)}",
    )
    # Any other tensor of another dtype is still refused.
    save_file(tensors | {"model.norm.weight": tensors["model.norm.weight"].float()}, tmp_path / SINGLE)
    with pytest.raises(ValueError, match="weights of one dtype are needed, found"):
        find_base_model(str(tmp_path)).check()


def test_the_one_file_is_read_before_an_index_as_transformers_reads_it(tmp_path, capsys):
    """An index that an earlier save left, with its files, or without them, or damaged: the weights are the same."""
    old, folder = (save_model("llama", tmp_path / part, dtype=torch.bfloat16, layers=1) for part in ("old", "model"))
    weights = {name: tensor * 2 for name, tensor in load_file(old / SINGLE).items()}
    sharded = "model-00001-of-00001.safetensors"
    save_file(weights, folder / sharded, metadata={"format": "pt"})
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(weights, sharded)}))
    (folder / "consolidated.safetensors").write_bytes(b"of another tool")
    loaded = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    for ignored in ([sharded], [], []):
        if not ignored:
            (folder / sharded).unlink(missing_ok=True)
        reader = HFReader(folder)
        assert all(torch.equal(reader.read(name), loaded[name]) for name in reader.names())
        assert not torch.equal(reader.read("model.norm.weight"), weights["model.norm.weight"])
        assert ignored_files(folder) == ["consolidated.safetensors", *ignored, INDEX]
        (folder / INDEX).write_text((folder / INDEX).read_text()[:-5])
    to_mcore(hf=folder, output=tmp_path / "checkpoint", num_workers=1)
    said = f"weights: read from {SINGLE}, as transformers does; ignored consolidated.safetensors, {INDEX}\n"
    assert said in capsys.readouterr().out
    assert find_base_model(str(folder)).notes == (said.strip(),)
    # The stale index does not travel, so that no export takes its sharding.
    assert INDEX not in copy_side_files(folder, tmp_path / "beside", with_index=True)
    assert not (tmp_path / "checkpoint" / "hf" / INDEX).exists()


def test_an_index_alone_is_read_and_other_files_are_said(tmp_path):
    save_model("llama", tmp_path, dtype=torch.bfloat16, layers=1)
    shutil.move(tmp_path / SINGLE, tmp_path / "a.safetensors")
    names = load_file(tmp_path / "a.safetensors")
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(names, "a.safetensors")}))
    assert find_base_model(str(tmp_path)).notes == ()
    (tmp_path / "b.safetensors").write_bytes(b"")
    description = describe(tmp_path)
    assert check_directory(description, open_reader(tmp_path, description)) == ()
    assert weights_dtype(tmp_path) == torch.bfloat16
    assert model_notes(tmp_path, description) == (
        "weights: read from the files that the index lists, as transformers does; ignored b.safetensors",
    )


def test_marks_of_other_tools_are_ignored_and_said(tmp_path):
    save_model("qwen2_tied", tmp_path, layers=1)
    plain = describe(tmp_path)
    fields = {"is_llama_config": True, "unsloth_fixed": True, "unsloth_version": "2025.1.5"}
    fields |= {"auto_map": {"AutoConfig": "code.Config"}, "transformers.js_config": {"dtype": "q4"}}
    assert fields.keys() == set(IGNORED_FIELDS)
    edit_config(tmp_path, **fields)
    marked = describe(tmp_path)
    assert marked == plain and marked.hf_config == plain.hf_config
    assert model_notes(tmp_path, plain) == ()
    assert model_notes(tmp_path, marked) == (
        "config.json: ignored auto_map, is_llama_config, transformers.js_config, unsloth_fixed, unsloth_version, which "
        "say nothing of the model; no code of the model is run",
    )
    edit_config(tmp_path, unsloth_scale=2.0)
    with pytest.raises(ValueError, match=r"unsloth_scale = 2.0 is not understood"):
        describe(tmp_path)


def test_weights_that_transformers_takes_from_a_named_file_are_refused(tmp_path):
    save_model("llama", tmp_path, layers=1)
    edit_config(tmp_path, transformers_weights="other.safetensors")
    with pytest.raises(ValueError, match="transformers_weights = 'other.safetensors' is not understood"):
        describe(tmp_path)


@pytest.fixture
def hostile(tmp_path, monkeypatch):
    """A model whose config and tokenizer name code of the directory, which would leave a mark; a user says yes."""
    from tokenizers import Tokenizer, models

    folder = save_model("llama", tmp_path / "model", layers=1)
    Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a")).save(str(folder / "tokenizer.json"))
    mark = tmp_path / "executed"
    (folder / "code.py").write_text(f"open({str(mark)!r}, 'w')\nclass Config: ...\nclass Tokens: ...\n")
    mapped = {
        "AutoConfig": "code.Config",
        "AutoModelForCausalLM": "code.Config",
        "AutoTokenizer": [None, "code.Tokens"],
    }
    edit_config(folder, auto_map=mapped)
    (folder / "tokenizer_config.json").write_text(json.dumps({"auto_map": mapped, "tokenizer_class": "Tokens"}))
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    return folder, mark


def test_no_code_of_a_model_directory_is_run(hostile, tmp_path):
    folder, mark = hostile
    base = find_base_model(str(folder))
    base.check()
    assert "no code of the model is run" in base.notes[0]
    to_mcore(hf=folder, output=tmp_path / "checkpoint", num_workers=1)
    data = in_memory([[0, 1]])
    data.meta = {"tokenizer_fingerprint": "another"}
    for attempt in (
        lambda: load_tokenizer(str(folder), needs_template=False),
        lambda: check_tokenizers(folder, [data]),
    ):
        try:
            attempt()
        except ValueError as error:
            assert "code" in str(error) or "another tokenizer" in str(error)
    assert not mark.exists()
    assert not (tmp_path / "checkpoint" / "hf" / "code.py").exists()
    with contextlib.suppress(Exception):  # the same directory does run where code is trusted
        AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    assert mark.exists()

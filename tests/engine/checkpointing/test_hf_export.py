"""What a training run leaves comes out as the Hugging Face directory that its users expect."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from checkpoint_tools import mcore_to_hf
from data.checksums import SUMS
from data.index import write_index
from engine.checkpointing.directory import STATE
from engine.checkpointing.export_sums import LIST
from engine.checkpointing.model_files import write_model_files
from engine.checkpointing.provenance import FILE
from engine.checkpointing.store_reader import StoreReader
from engine.run_folder import RunFolder
from models.hf_config import describe
from tests.engine.checkpointing.test_resume import run
from tests.support.chatting import small_tokenizer
from tests.support.tiny import EXPERTS, MODELS, VOCABULARY, conversations, read_json, save_model

EVERYWHERE = "--tp 2 --pp 2"
SHARDED = [(name, torch.bfloat16, EVERYWHERE) for name in MODELS]
SHARDED += [(name, torch.float32, EVERYWHERE) for name in ("llama", "olmo2", "gpt_oss")]
SHARDED += [(name, torch.bfloat16, "--ep 2 --pp 2") for name in EXPERTS]
SHARDED += [("qwen3_moe", torch.bfloat16, "--ep 2 --etp 2 --tp 2")]
TEMPLATE = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "data"
    write_index(folder, conversations(8).documents, vocab_size=VOCABULARY)
    return folder


def train(pool, ranks: int, model: Path, data: Path, output: Path, *extra: str) -> Path:
    fixed = ["--model", model, "--data", data, "--output", output]
    shape = ["--seq-len", "96", "--global-batch-size", "4", "--steps", "1"]
    pool.run(run, ranks, [*map(str, fixed), *shape, *extra])
    return RunFolder(output).checkpoint(1)


def exported(folder: Path) -> dict[str, bytes]:
    """The files of a model directory but for those that our exports add: checksums, and what they were made of."""
    ours = {path.name for path in folder.iterdir() if path.suffix == SUMS or path.name in (LIST, FILE)}
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name not in ours}


@pytest.mark.parametrize(("name", "dtype", "layout"), SHARDED)
def test_a_run_that_learns_nothing_exports_its_source(pool, data, tmp_path, name, dtype, layout):
    """Through a sharded checkpoint, at a learning rate of zero: every file bit for bit."""
    source = save_model(name, tmp_path / "source", dtype=dtype, layers=2)
    precision = "fp32" if dtype == torch.float32 else "bf16"
    flags = ("--precision", precision, *layout.split(), "--optim.lr", "0", "--optim.weight-decay", "0")
    checkpoint = train(pool, 4, source, data, tmp_path / "run", *flags, "--checkpoint.export-hf")
    target = tmp_path / "export"
    mcore_to_hf.main(checkpoint=checkpoint, output=target)
    for file in source.iterdir():
        assert (target / file.name).read_bytes() == file.read_bytes(), file.name
    assert exported(target).keys() == exported(source).keys()
    beside = RunFolder(checkpoint.parent.parent).export(1)  # written by the run's own ranks
    assert exported(beside) == exported(source)
    models = [AutoModelForCausalLM.from_pretrained(path, dtype=dtype) for path in (source, target)]
    tokens = torch.arange(40)[None] % VOCABULARY
    assert torch.equal(*(model(tokens).logits for model in models))


def test_wide_exports_come_from_the_master_weights(pool, data, tmp_path):
    source = save_model("qwen2_tied", tmp_path / "source", dtype=torch.bfloat16, layers=2)
    flags = ("--precision", "bf16", "--optim.lr", "1e-4", "--optim.schedule", "constant")
    checkpoint = train(pool, 2, source, data, tmp_path / "run", *flags)
    mcore_to_hf.main(checkpoint=checkpoint, output=tmp_path / "wide", dtype="fp32")
    mcore_to_hf.main(checkpoint=checkpoint, output=tmp_path / "narrow")
    wide, narrow = (load_file(tmp_path / name / "model.safetensors") for name in ("wide", "narrow"))
    store = StoreReader(checkpoint / STATE)
    key = "decoder.final_layernorm.weight"
    assert torch.equal(wide["model.norm.weight"], store.read(f"optimizer.state.param.{key}"))
    for name, tensor in wide.items():
        assert tensor.dtype == torch.float32 and narrow[name].dtype == torch.bfloat16
        assert torch.equal(tensor.bfloat16(), narrow[name]), name
    assert any(not torch.equal(tensor, narrow[name].float()) for name, tensor in wide.items())


def test_overrides_reach_training_and_export(pool, data, tmp_path):
    source = save_model("qwen2_untied", tmp_path / "source", layers=2, max_position_embeddings=64)
    flags = ("--precision", "fp32", "--override.rope-theta", "500000", "--override.max-position-embeddings", "512")
    checkpoint = train(pool, 1, source, data, tmp_path / "run", *flags)
    mcore_to_hf.main(checkpoint=checkpoint, output=tmp_path / "export")
    description = describe(tmp_path / "export")
    assert description.max_position_embeddings == 512
    assert description.rope[0]["rope_theta"] == 500000
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "export")
    assert loaded.config.max_position_embeddings == 512


def test_a_given_template_and_its_end_token_reach_the_export(tmp_path):
    """A base model's files with another template: it replaces the own one, and generation learns to stop."""
    source = save_model("qwen2_untied", tmp_path / "source", layers=1)
    tokenizer = copy.deepcopy(small_tokenizer())
    tokenizer.chat_template = None
    tokenizer.save_pretrained(source)
    (source / "generation_config.json").write_text(json.dumps({"eos_token_id": 1, "temperature": 0.5}))
    meta = {"chat_template": TEMPLATE, "end_token_ids": [7]}
    write_model_files(source, tmp_path / "files", overrides={}, data=meta)
    assert read_json(tmp_path / "files" / "generation_config.json") == {"eos_token_id": [7, 1], "temperature": 0.5}
    assert AutoTokenizer.from_pretrained(tmp_path / "files").chat_template == TEMPLATE
    write_model_files(tmp_path / "files", tmp_path / "again", overrides={}, data=meta)
    for file in (tmp_path / "files").iterdir():
        assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes()


def test_templates_chosen_by_name_reach_the_export(tmp_path):
    """Both ways in which transformers keeps several, and one in place of several."""
    named = {"default": TEMPLATE, "tool_use": TEMPLATE + "{# tools #}"}
    source, kept = save_model("qwen2_untied", tmp_path / "source", layers=1), tmp_path / "kept"
    tokenizer = copy.deepcopy(small_tokenizer())
    tokenizer.chat_template = TEMPLATE + "{# old #}"
    tokenizer.save_pretrained(source)

    def exported(files: Path, template: str | dict[str, str]) -> str | dict[str, str]:
        write_model_files(files, kept, overrides={}, data={"chat_template": template})
        return AutoTokenizer.from_pretrained(kept).chat_template

    assert exported(source, named) == named
    tokenizer.chat_template = named
    tokenizer.save_pretrained(source)
    assert exported(source, named) == named
    before = {path.name: path.read_bytes() for path in source.rglob("*.jinja")}
    assert {path.name: path.read_bytes() for path in kept.rglob("*.jinja")} == before
    assert exported(source, TEMPLATE) == named, "the data was prepared with one of the model's own"
    assert exported(source, TEMPLATE + "{# new #}") == TEMPLATE + "{# new #}"
    shutil.rmtree(source / "additional_chat_templates")
    (source / "chat_template.jinja").unlink()
    config = read_json(source / "tokenizer_config.json")
    older = [{"name": name, "template": template} for name, template in named.items()]
    (source / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": older}))
    assert exported(source, named) == named and not list(kept.rglob("*.jinja")), "it stays as the model keeps it"
    assert exported(source, {**named, "tool_use": "other"}) == {**named, "tool_use": "other"}

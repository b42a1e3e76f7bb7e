"""Rows for tokens that were added: the mean of the rows that files hold, and only where they were asked for."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from checkpoint_tools import mcore_to_hf
from data.index import write_index
from engine.base_model import find_base_model, weight_reader
from engine.checkpointing.directory import STATE
from engine.checkpointing.hf_export import open_checkpoint
from engine.checkpointing.store_reader import StoreReader
from engine.run_folder import RunFolder
from models.conversion.hf_reader import SINGLE, HFReader
from models.conversion.resize import BLOCK_ROWS, ResizedReader
from models.hf_config import describe
from models.model_directory import VOCABULARY_KEYS, check_directory, open_reader
from tests.engine.checkpointing.test_resume import run
from tests.support.marks import slow
from tests.support.tiny import VOCABULARY, Memory, conversations, save_model

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
GROWN = VOCABULARY + 9


@pytest.fixture(scope="module", params=["llama", "qwen2_tied"])
def folder(request, tmp_path_factory):
    return save_model(request.param, tmp_path_factory.mktemp(request.param), dtype=torch.bfloat16, layers=1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_new_rows_are_the_mean_of_all_rows_computed_once(dtype):
    count = 2 * BLOCK_ROWS + 5
    # Large enough that sums in fp32 or of less than all rows would be seen.
    values = (torch.randn(count, 6, generator=torch.Generator().manual_seed(1)) + 1000 * torch.arange(6)).to(dtype)
    memory = Memory({"w": values, "other": torch.ones(2)})
    reader = ResizedReader(memory, {"w": count + 3})
    assert (reader.names(), reader.shape("w"), reader.dtype("w")) == (["w", "other"], (count + 3, 6), dtype)
    assert reader.shape("other") == (2,)
    expected = (values.double().sum(0) / count).to(dtype)
    assert reader.read("w", (slice(0, count),)).equal(values)
    assert memory.reads["w"] == 1  # no mean is needed for rows that are there
    assert torch.equal(reader.read("w"), torch.cat([values, expected.expand(3, 6)]))
    assert memory.reads["w"] == 1 + 1 + 3
    assert torch.equal(reader.read("w", (slice(count + 1, count + 2),)), expected[None])
    assert memory.reads["w"] == 5


@settings(deadline=None, max_examples=100)
@given(data=st.data())
def test_any_slice_is_that_slice_of_the_whole(data):
    memory = Memory({"w": torch.arange(35.0).view(7, 5)})
    reader = ResizedReader(memory, {"w": 12})
    whole = reader.read("w")
    index = tuple(
        slice(
            data.draw(st.none() | st.integers(0, size)),
            data.draw(st.none() | st.integers(0, size + 1)),
            data.draw(st.none() | st.integers(1, 4)),
        )
        for size in (12, 5)[: data.draw(st.integers(0, 2))]
    )
    assert torch.equal(reader.read("w", index), whole[index])
    out = torch.full_like(whole[index].mT.contiguous(), -1.0)
    reader.read("w", index, out.mT)
    assert torch.equal(out.mT, whole[index])


def test_embedding_and_head_grow_with_the_vocabulary(folder):
    description = describe(folder, overrides={"vocab_size": GROWN})
    reader = open_reader(folder, description)
    assert check_directory(description, reader) == ()
    files = load_file(folder / SINGLE)
    names = [name for name in (EMBEDDING, HEAD) if name in files]
    assert len(names) == (1 if description.tied else 2)
    assert reader.names() == sorted(files)
    for key, name in zip(("embedding.word_embeddings.weight", "output_layer.weight"), names, strict=False):
        mean = files[name].double().mean(0).bfloat16()
        assert mean.abs().max() > 0
        tensor = description.rule[key].read(reader)
        assert torch.equal(tensor[:VOCABULARY], files[name])
        assert torch.equal(tensor[VOCABULARY:GROWN], mean.expand(9, -1))
        assert not tensor[GROWN:].any()
        # The rank that holds both old and new rows, and padding.
        part = description.rule[key].read(reader, (slice(128, 192), slice(16, 32)))
        assert torch.equal(part, tensor[128:192, 16:32])
    norm = "model.norm.weight"
    assert torch.equal(reader.read(norm), files[norm])


def test_nothing_grows_that_was_not_asked_for(folder, tmp_path):
    assert isinstance(open_reader(folder, describe(folder)), HFReader)
    smaller = describe(folder, overrides={"vocab_size": VOCABULARY - 1})
    with pytest.raises(
        ValueError, match=rf"embed_tokens.weight \[{VOCABULARY}, 64\] instead of \[{VOCABULARY - 1}, 64"
    ):
        check_directory(smaller, open_reader(folder, smaller))
    # A directory whose own config.json counts more tokens than its files have rows is damaged.
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"vocab_size": GROWN - 1}))
    (tmp_path / SINGLE).write_bytes((folder / SINGLE).read_bytes())
    for description in (describe(tmp_path), describe(tmp_path, overrides={"vocab_size": GROWN})):
        with pytest.raises(ValueError, match=rf"embed_tokens.weight \[{VOCABULARY}, 64\] instead of"):
            check_directory(description, open_reader(tmp_path, description))


def test_the_second_copy_of_tied_embeddings_grows_with_the_first(tmp_path):
    save_model("qwen2_tied", tmp_path, dtype=torch.bfloat16, layers=1)
    tensors = load_file(tmp_path / SINGLE)
    save_file(tensors | {HEAD: tensors[EMBEDDING].clone()}, tmp_path / SINGLE)
    description = describe(tmp_path, overrides={"vocab_size": GROWN})
    assert check_directory(description, open_reader(tmp_path, description)) == (HEAD,)
    save_file(tensors | {HEAD: tensors[EMBEDDING] + 1}, tmp_path / SINGLE)
    with pytest.raises(ValueError, match=f"{HEAD} differs from {EMBEDDING}"):
        check_directory(description, open_reader(tmp_path, description))


@pytest.mark.parametrize("name", ["qwen2_tied", slow("llama")])
def test_a_run_gives_rows_to_new_tokens_and_exports_them(pool, tmp_path, name):
    """9 tokens more than the model has, over 2 vocabulary-parallel ranks: counted, trained, resumed, exported."""
    source = save_model(name, tmp_path / "model", layers=1)
    documents = conversations(8).documents
    documents[0][0][:9] = np.arange(VOCABULARY, VOCABULARY + 9)
    write_index(tmp_path / "data", documents, vocab_size=VOCABULARY + 9)
    fixed = ["--model", source, "--data", tmp_path / "data", "--output", tmp_path / "run", "--checkpoint.every", "1"]
    shape = ["--seq-len", "96", "--global-batch-size", "8", "--precision", "fp32", "--tp", "2"]
    flags = [*map(str, fixed), *shape, "--optim.weight-decay", "0", "--optim.lr", "0"]
    with pytest.raises(RuntimeError, match="a vocabulary of 140 tokens and the model has 131; .*--override.resize-emb"):
        pool.run(run, 2, [*flags, "--steps", "1"])
    pool.run(run, 2, [*flags, "--steps", "1", "--override.resize-embeddings"])
    pool.run(run, 2, [*flags, "--steps", "2", "--override.resize-embeddings"])
    mcore_to_hf.main(checkpoint=RunFolder(tmp_path / "run").checkpoint(2), output=tmp_path / "export")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "export")
    assert model.config.vocab_size == VOCABULARY + 9
    plain = AutoModelForCausalLM.from_pretrained(source).state_dict()
    for key in ("model.embed_tokens.weight", "lm_head.weight"):
        grown = model.state_dict()[key]
        assert torch.equal(grown[:VOCABULARY], plain[key])
        mean = plain[key].double().mean(0).float()
        assert torch.equal(grown[VOCABULARY:], mean.expand(9, -1))


@pytest.mark.parametrize("name", ["llama", slow("qwen2_tied")])
def test_a_checkpoint_of_ours_grows_by_the_mean_of_its_rows(pool, tmp_path, name):
    """Inside the 256 rows of its padded vocabulary and beyond them, by its own weights and by its master weights."""
    save_model(name, tmp_path / "model", layers=1)
    write_index(tmp_path / "data", conversations(8).documents, vocab_size=VOCABULARY)
    shape = ["--seq-len", "96", "--global-batch-size", "8", "--tp", "2", "--steps", "1"]

    def flags(model, data, output):
        fixed = ["--model", model, "--data", tmp_path / data, "--output", tmp_path / output]
        return [*map(str, fixed), *shape]

    rates = ["--precision", "bf16", "--optim.lr", "1e-2", "--optim.schedule", "constant"]
    pool.run(run, 2, [*flags(tmp_path / "model", "data", "first"), *rates])
    step = RunFolder(tmp_path / "first").checkpoint(1)
    base, store = find_base_model(str(step)), StoreReader(step / STATE)
    for key in VOCABULARY_KEYS[: 1 if describe(base.files).tied else 2]:
        own = store.read(f"optimizer.state.param.{key}")
        assert own.shape[0] == 256 and not own[VOCABULARY:].any()
        mean = own[:VOCABULARY].double().mean(0).to(own.dtype)
        for tokens, padded in ((GROWN, 256), (300, 384)):
            more = describe(base.files, overrides={"vocab_size": tokens})
            read = weight_reader(replace(base, description=more))
            parts = [read(key, (start, 0), (padded // 4, 64)) for start in range(0, padded, padded // 4)]
            tensor = torch.cat(parts)
            assert torch.equal(tensor[:VOCABULARY], own[:VOCABULARY])
            assert torch.equal(tensor[VOCABULARY:tokens], mean.expand(tokens - VOCABULARY, -1))
            assert not tensor[tokens:].any()
            for start, stop, left, right in ((0, 1, 7, 50), (130, 141, 3, 4), (padded - 90, padded, 0, 63)):
                box = read(key, (start, left), (stop - start, right - left))  # as data-parallel ranks read them
                assert torch.equal(box, tensor[start:stop, left:right])
    documents = conversations(8).documents
    documents[0][0][:2] = VOCABULARY, 299
    write_index(tmp_path / "large", documents, vocab_size=300)
    still = ["--precision", "fp32", "--optim.lr", "0", "--optim.weight-decay", "0", "--override.resize-embeddings"]
    pool.run(run, 2, [*flags(step, "large", "second"), *still])
    mcore_to_hf.main(checkpoint=RunFolder(tmp_path / "second").checkpoint(1), output=tmp_path / "export", dtype="fp32")
    table = load_file(tmp_path / "export" / SINGLE)[EMBEDDING]
    own = store.read("optimizer.state.param.embedding.word_embeddings.weight")[:VOCABULARY]
    assert torch.equal(table, torch.cat([own, own.double().mean(0).float().expand(300 - VOCABULARY, -1)]))


def test_the_largest_of_several_data_sets_names_the_vocabulary(pool, tmp_path):
    """And brings its tokenizer; a checkpoint whose config.json counts fewer tokens than it holds is refused."""
    source = save_model("llama", tmp_path / "model", layers=1)
    for seed, (name, tokens) in enumerate((("data", VOCABULARY + 3), ("large", GROWN), ("valid", VOCABULARY))):
        write_index(tmp_path / name, conversations(8, seed).documents, vocab_size=tokens)
    (tmp_path / "large" / "tokenizer").mkdir()
    (tmp_path / "large" / "tokenizer" / "tokenizer.json").write_text("{}")
    paths = ["--model", source, "--data", tmp_path / "data", tmp_path / "large", "--valid", tmp_path / "valid"]
    shape = ["--seq-len", "96", "--global-batch-size", "8", "--steps", "1", "--precision", "fp32"]
    pool.run(run, 1, [*map(str, paths), "--output", str(tmp_path / "run"), *shape, "--override.resize-embeddings"])
    step = RunFolder(tmp_path / "run").checkpoint(1)
    mcore_to_hf.main(checkpoint=step, output=tmp_path / "export")
    assert load_file(tmp_path / "export" / SINGLE)[EMBEDDING].shape == (GROWN, 64)
    assert describe(tmp_path / "export").vocab_size == GROWN
    assert (tmp_path / "export" / "tokenizer.json").read_text() == "{}"
    config = step / "hf" / "config.json"
    config.write_text(config.read_text().replace(f'"vocab_size": {GROWN}', f'"vocab_size": {GROWN - 6}'))
    with pytest.raises(ValueError, match=r"hf/config.json is damaged"):
        open_checkpoint(step)

"""Hugging Face files: slices read, files written just as transformers writes them, damage refused."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from models.conversion.hf_reader import INDEX, SINGLE, HFReader, copy_side_files
from models.conversion.hf_writer import HFWriter
from models.model_directory import weights_dtype
from tests.support.tiny import save_model


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    """A model in several files, as transformers shards it."""
    from transformers import AutoModelForCausalLM

    whole = save_model("qwen2_untied", tmp_path_factory.mktemp("whole"), dtype=torch.bfloat16, layers=2)
    folder = tmp_path_factory.mktemp("sharded")
    AutoModelForCausalLM.from_pretrained(whole).save_pretrained(folder, max_shard_size="50KB")
    assert len(list(folder.glob("model-*-of-*.safetensors"))) > 2
    return folder


@pytest.fixture
def copied(sharded, tmp_path):
    return shutil.copytree(sharded, tmp_path / "copy")


def plan_of(reader):
    return {name: (reader.shape(name), reader.dtype(name)) for name in reader.names()}


def test_reads_whole_tensors_and_slices_from_sharded_files(sharded):
    from transformers import AutoModelForCausalLM

    reader = HFReader(sharded)
    expected = AutoModelForCausalLM.from_pretrained(sharded).state_dict()
    assert reader.names() == sorted(expected)
    for name, tensor in expected.items():
        assert (reader.shape(name), reader.dtype(name)) == (tuple(tensor.shape), torch.bfloat16)
        assert torch.equal(reader.read(name), tensor)
    name = "model.layers.1.mlp.down_proj.weight"
    part = reader.read(name, (slice(5, 9), slice(10, 50)))
    assert torch.equal(part, expected[name][5:9, 10:50])
    # The part owns its memory: no mapped file stays behind it.
    assert part.untyped_storage().nbytes() == part.nbytes == 4 * 40 * 2
    assert torch.equal(reader.read(name, (slice(None), slice(0, 3))), expected[name][:, :3])
    assert weights_dtype(sharded) == torch.bfloat16


def test_writes_the_files_that_transformers_wrote_byte_for_byte(sharded, tmp_path):
    reader = HFReader(sharded)
    with HFWriter(tmp_path, plan_of(reader), like=sharded) as writer:
        for name in reversed(reader.names()):
            writer.write(name, reader.read(name))
    written = sorted(path.name for path in tmp_path.iterdir())
    assert written == sorted([INDEX, *(path.name for path in sharded.glob("model-*"))])
    for name in written:
        assert (tmp_path / name).read_bytes() == (sharded / name).read_bytes(), name


def test_shards_by_size_and_writes_by_pieces_of_rows(tmp_path):
    tensors = {
        "a": torch.randn(10, 10),
        "b": torch.randn(7, 10),
        "c": torch.randn(20, 10).bfloat16(),
        "d": torch.tensor(3.0),
        "e": torch.randn(3).double(),
    }
    plan = {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}
    with HFWriter(tmp_path, plan, shard_bytes=700) as writer:
        for name, tensor in tensors.items():
            if name == "c":
                writer.write(name, tensor[12:], start=12)
                writer.write(name, tensor[:12])
            else:
                writer.write(name, tensor)
    index = json.loads((tmp_path / INDEX).read_text())
    files = [f"model-{number:05d}-of-00002.safetensors" for number in (1, 2)]
    # a and b together have 680 bytes; c, d and e have 428 more.
    assert index["weight_map"] == {"a": files[0], "b": files[0], "c": files[1], "d": files[1], "e": files[1]}
    assert index["metadata"]["total_size"] == 400 + 280 + 400 + 4 + 24
    read = {name: tensor for file in files for name, tensor in load_file(tmp_path / file).items()}
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert read[name].dtype == tensor.dtype
        assert torch.equal(read[name], tensor)
        assert torch.equal(HFReader(tmp_path).read(name), tensor)


def test_one_file_has_no_index(tmp_path):
    (tmp_path / INDEX).write_text("{}")
    with HFWriter(tmp_path, {"a": ((2,), torch.float32)}) as writer:
        writer.write("a", torch.ones(2))
    assert [path.name for path in tmp_path.iterdir()] == [SINGLE]


def test_the_writer_refuses_what_it_did_not_plan(tmp_path):
    plan = {"a": ((4, 2), torch.float32), "b": ((1,), torch.float32)}
    with (
        pytest.raises(ValueError, match=r"1 tensor\(s\) were not written: b"),
        HFWriter(tmp_path, plan) as writer,
    ):
        writer.write("a", torch.zeros(4, 2))
    with (
        pytest.raises(ValueError, match=r"1 tensor\(s\) were not written: a"),
        HFWriter(tmp_path, plan) as writer,
    ):
        writer.write("a", torch.zeros(3, 2))
        writer.write("b", torch.zeros(1))
    with pytest.raises(ValueError, match="more rows were written"), HFWriter(tmp_path, plan) as writer:
        writer.write("a", torch.zeros(4, 2))
        writer.write("a", torch.zeros(1, 2))
    with pytest.raises(ValueError, match=r"bfloat16 \[4, 2\] is not"), HFWriter(tmp_path, plan) as writer:
        writer.write("a", torch.zeros(4, 2).bfloat16())


def test_an_index_that_drifted_from_its_files_is_refused(copied):
    index = json.loads((copied / INDEX).read_text())
    weight_map = index["weight_map"]
    file = next(iter(weight_map.values()))
    (copied / INDEX).write_text(json.dumps({"weight_map": {**weight_map, "model.ghost": file}}))
    with pytest.raises(ValueError, match=r"does not agree with its files on 1 tensor\(s\): model.ghost"):
        HFReader(copied)
    unlisted = {name: where for name, where in weight_map.items() if name != "model.norm.weight"}
    (copied / INDEX).write_text(json.dumps({"weight_map": unlisted}))
    with pytest.raises(ValueError, match=r"on 1 tensor\(s\): model.norm.weight"):
        HFReader(copied)
    (copied / INDEX).write_text(json.dumps({"weight_map": {"a": "../secret.safetensors"}}))
    with pytest.raises(ValueError, match="outside its directory: ../secret.safetensors"):
        HFReader(copied)
    (copied / INDEX).write_text("[]")
    with pytest.raises(ValueError, match="is damaged"):
        HFReader(copied)


def test_a_truncated_or_missing_shard_is_named(copied):
    shard = sorted(copied.glob("model-*"))[1]
    content = shard.read_bytes()
    for length in (len(content) - 1, 100, 4, 0):
        shard.write_bytes(content[:length])
        with pytest.raises(ValueError, match=f"{shard.name} is truncated or damaged"):
            HFReader(copied)
    shard.unlink()
    with pytest.raises(ValueError, match=f"lacks {shard.name}, which its {INDEX} lists"):
        HFReader(copied)


def test_directories_without_safetensors_are_refused(tmp_path):
    with pytest.raises(ValueError, match=f"holds no {SINGLE}"):
        HFReader(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ValueError, match="pytorch_model.bin, which is a pickle"):
        HFReader(tmp_path)


def test_several_dtypes_have_no_source_dtype(tmp_path):
    save_file({"a": torch.zeros(2), "b": torch.zeros(2).bfloat16()}, tmp_path / SINGLE)
    with pytest.raises(ValueError, match="weights of one dtype are needed"):
        weights_dtype(tmp_path)


def test_side_files_are_everything_but_weights(copied, tmp_path):
    side = {
        "tokenizer.json": "1",
        "tokenizer_config.json": "2",
        "chat_template.jinja": "3",
        "additional_chat_templates/tools.jinja": "4",
        "vocab.json": "5",
        "merges.txt": "6",
        "tokenizer.model": "7",
        "special_tokens_map.json": "8",
    }
    for name, text in {**side, "README.md": "9", "optimizer.bin": "10", "notes/config.json": "11"}.items():
        (copied / name).parent.mkdir(exist_ok=True)
        (copied / name).write_text(text)
    names = {*side, "config.json", "generation_config.json"}
    assert set(copy_side_files(copied, tmp_path / "a")) == names
    assert set(copy_side_files(copied, tmp_path / "b", with_index=True)) == {*names, INDEX}
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (copied / name).read_bytes()

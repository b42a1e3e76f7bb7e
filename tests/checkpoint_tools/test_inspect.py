"""Differences of two checkpoints or Hugging Face directories: counts, sizes of errors, and the exit status."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from checkpoint_tools import hf_to_mcore, inspect_checkpoint
from checkpoint_tools.compare import Plain, compare
from engine.checkpointing.store_reader import StoreReader
from engine.checkpointing.store_writer import write_store
from models.conversion.hf_reader import SINGLE, HFReader
from tests.support.tiny import save_model


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """(Hugging Face directory in bf16, its checkpoint)."""
    folder = tmp_path_factory.mktemp("pair")
    save_model("llama", folder / "hf", dtype=torch.bfloat16, layers=1)
    hf_to_mcore.main(folder / "hf", folder / "checkpoint")
    return folder / "hf", folder / "checkpoint"


def changed(source: Path, target: Path, **changes) -> Path:
    """A copy of a directory in which tensors were put in place of others, or taken out (None)."""
    shutil.copytree(source, target)
    tensors = load_file(target / SINGLE)
    for name, tensor in changes.items():
        if tensor is None:
            del tensors[name]
        else:
            tensors[name] = tensor
    save_file(tensors, target / SINGLE)
    return target


@pytest.mark.parametrize("workers", [1, 2])
def test_equal_things_are_equal_in_either_format(pair, capsys, workers):
    source, checkpoint = pair
    count = len(HFReader(source).names())
    for one, other in ((source, source), (source, checkpoint), (checkpoint, source)):
        assert inspect_checkpoint.main(one, other, num_workers=workers) == 0
        assert capsys.readouterr().out == f"equal: {count} of {count} common tensors are bit-equal\n"
    assert inspect_checkpoint.main(checkpoint, checkpoint / "state", num_workers=workers) == 0
    keys = len(StoreReader(checkpoint / "state").keys())
    assert capsys.readouterr().out == f"equal: {keys} of {keys} common tensors are bit-equal\n"
    with pytest.raises(ValueError, match="does not say which model it holds"):
        inspect_checkpoint.main(checkpoint / "state", source)


@pytest.mark.parametrize("swap", [False, True])
def test_values_shapes_dtypes_and_names_are_told(pair, tmp_path, capsys, swap):
    source, checkpoint = pair
    tensors = load_file(source / SINGLE)
    key = "model.layers.0.self_attn.k_proj.weight"
    values = tensors[key].clone()
    values[3, 5] = 2 * values[3, 5]
    values[31, 0] = values[31, 0] + 64
    norm = tensors["model.norm.weight"]
    other = changed(
        source,
        tmp_path / "other",
        **{
            key: values,
            "model.norm.weight": norm.float(),
            "lm_head.weight": tensors["lm_head.weight"][:100].clone(),
            "model.extra": norm.clone(),
            "model.layers.0.mlp.up_proj.weight": None,
        },
    )
    absolute = (values.double() - tensors[key].double()).abs()
    relative = absolute / torch.maximum(values.double().abs(), tensors[key].double().abs())
    relative[absolute == 0] = 0
    for one in (source, checkpoint):
        assert inspect_checkpoint.main(*((other, one) if swap else (one, other))) == 1
        lines = set(capsys.readouterr().out.splitlines())
        summary = next(line for line in lines if line.startswith("different: "))
        shapes, dtypes = ["[131, 64]", "[100, 64]"], ["bfloat16", "float32"]
        if swap:
            shapes, dtypes = shapes[::-1], dtypes[::-1]
        assert lines - {summary} == {
            f"only in {one}: model.layers.0.mlp.up_proj.weight",
            f"only in {other}: model.extra",
            f"lm_head.weight: shapes {' and '.join(shapes)}",
            f"model.norm.weight: dtypes {' and '.join(dtypes)}, equal values",
            f"{key}: 2 of 2,048 elements differ, by at most {absolute.max():.3g}, relatively {relative.max():.3g}",
        }
        assert summary == (
            "different: 8 of 11 common tensors are bit-equal, 2 only on one side, 2 elements differ, "
            f"by at most {absolute.max():.3g}"
        )
        assert inspect_checkpoint.main(one, other, match="*o_proj*") == 0
        capsys.readouterr()


@pytest.mark.parametrize(
    ("left", "right", "expected"),
    [
        ([0.0, 1.0], [-0.0, 1.0], (1, 0.0, 0.0)),
        ([float("nan"), 1.0], [float("nan"), 1.5], (1, 0.5, 1 / 3)),
        ([float("nan"), 1.0], [2.0, 1.0], (1, float("inf"), float("inf"))),
        ([float("inf"), 4.0], [float("inf"), 4.0], (0, 0.0, 0.0)),
        ([float("inf"), 4.0], [1.0, 5.0], (2, float("inf"), float("inf"))),
    ],
)
def test_zeros_nans_and_infinities(tmp_path, left, right, expected):
    for name, values in (("a", left), ("b", right)):
        tensor = torch.tensor(values)
        write_store(tmp_path / name, [("t", tensor.shape, tensor.dtype, tensor.__getitem__)])
    sides = Plain(StoreReader(tmp_path / "a")), Plain(StoreReader(tmp_path / "b"))
    found = compare(sides, "t", lambda count: None)
    assert (found.elements, found.absolute, found.relative) == pytest.approx(expected)
    assert bool(found) == bool(expected[0])


def test_stacked_experts_are_compared_with_files(tmp_path, capsys):
    from tests.checkpoint_tools.test_conversion import save_other

    source = save_other("gpt_oss", tmp_path / "hf")
    hf_to_mcore.main(source, tmp_path / "checkpoint")
    capsys.readouterr()
    assert inspect_checkpoint.main(tmp_path / "checkpoint", source) == 0
    assert capsys.readouterr().out.startswith("equal: ")
    key = "model.layers.2.mlp.experts.gate_up_proj"
    file = source / json.loads((source / "model.safetensors.index.json").read_text())["weight_map"][key]
    tensors = load_file(file)
    tensors[key][5, 7, 11] += 1
    save_file(tensors, file)
    assert inspect_checkpoint.main(source, tmp_path / "checkpoint") == 1
    assert f"{key}: 1 of {tensors[key].numel():,} elements differ, by at most 1" in capsys.readouterr().out

"""Averages of checkpoints: the fp64 mean rounded once, bit for bit, in bounded memory."""

import os
import shutil
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from checkpoint_tools import average_steps, hf_to_mcore
from checkpoint_tools.average_steps import find_steps
from checkpoint_tools.mean import mean_of_two, round_once
from engine.checkpointing.directory import read_manifest, write_manifest
from engine.checkpointing.store_reader import StoreReader
from engine.checkpointing.store_writer import write_store
from models.conversion.hf_reader import SINGLE
from models.hf_config import describe
from tests.support.tiny import save_model

ROOT = Path(__file__).parents[2]


def write_step(run: Path, origin: Path, step: int, tensors: dict[str, torch.Tensor], **meta) -> Path:
    """A checkpoint of `origin`'s model with the given tensors in its store."""
    target = run / "checkpoints" / f"step_{step:06d}"
    shutil.copytree(origin / "hf", target / "hf")
    write_store(target / "state", [(key, t.shape, t.dtype, t.__getitem__) for key, t in tensors.items()], 4096)
    fields = {name: value for name, value in read_manifest(origin).items() if name != "files"}
    write_manifest(target, {**fields, "step": step, **meta})
    return target


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(run directory, steps, model tensors by step, master weights by step, description)."""
    folder = tmp_path_factory.mktemp("run")
    source = save_model("qwen2_tied", folder / "hf", dtype=torch.bfloat16, layers=1)
    hf_to_mcore.main(hf=source, output=folder / "origin")
    description = describe(source)
    model, masters = {}, {}
    for step in (75, 7500, 75000, 750000, 1750000):
        torch.manual_seed(step)
        masters[step] = {rule.key: torch.randn(rule.shape) for rule in description.rules}
        # Not the rounded masters, so that a mean of the wrong ones shows.
        model[step] = {key: torch.randn(t.shape).bfloat16() for key, t in masters[step].items()}
        stored = {"optimizer.state.param." + key: t for key, t in masters[step].items()}
        # Steps under 1000 have no optimizer.
        write_step(folder, folder / "origin", step, model[step] | (stored if step > 1000 else {}))
    return folder, model, masters, description


def mean(tensors: list[torch.Tensor]) -> torch.Tensor:
    total = sum(tensor.double() for tensor in tensors)
    return total / len(tensors)


def test_masters_are_averaged_in_fp64_and_rounded_once(run, tmp_path):
    folder, _, masters, description = run
    steps = (7500, 75000, 750000)
    for dtype, target in (("fp32", torch.float32), ("source", torch.bfloat16)):
        average_steps.main(folder, "7500,75000,750000", tmp_path / dtype, dtype=dtype)
        store = StoreReader(tmp_path / dtype / "state")
        for rule in description.rules:
            expected = round_once(mean([masters[step][rule.key] for step in steps]), target)
            assert store.dtype(rule.key) == target
            assert torch.equal(store.read(rule.key), expected), rule.key
    average_steps.main(folder, "7500,75000,750000", tmp_path / "serial", num_workers=1)
    stores = [StoreReader(tmp_path / name / "state") for name in ("serial", "source")]
    assert all(torch.equal(*(store.read(rule.key) for store in stores)) for rule in description.rules)
    meta = read_manifest(tmp_path / "source")
    assert (meta["mean_of_steps"], meta["source_dtype"], meta["step"]) == (list(steps), "bfloat16", 750000)


def test_model_weights_are_averaged_where_there_are_no_masters(run, tmp_path):
    folder, model, masters, description = run
    average_steps.main(folder, "75", tmp_path / "one")
    average_steps.main(folder, "75,1750000", tmp_path / "two")
    for rule in description.rules:
        key = rule.key
        assert torch.equal(StoreReader(tmp_path / "one" / "state").read(key), model[75][key])
        expected = round_once(mean([model[75][key], masters[1750000][key]]), torch.bfloat16)
        assert torch.equal(StoreReader(tmp_path / "two" / "state").read(key), expected)


def test_a_hugging_face_average_holds_the_same_numbers(run, tmp_path):
    from transformers import AutoModelForCausalLM

    folder, _, masters, description = run
    for dtype, target in (("source", torch.bfloat16), ("fp32", torch.float32)):
        average_steps.main(folder, "7500,75000", tmp_path / dtype, format="hf", dtype=dtype)
        exported = load_file(tmp_path / dtype / SINGLE)
        for rule in description.rules:
            whole = round_once(mean([masters[7500][rule.key], masters[75000][rule.key]]), target)
            for name, part in rule.split(whole):
                assert torch.equal(exported.pop(name), part), name
        assert not exported
        assert AutoModelForCausalLM.from_pretrained(tmp_path / dtype).dtype == target
    config = (tmp_path / "source" / "config.json").read_bytes()
    assert config == (folder / "hf" / "config.json").read_bytes()


def test_an_average_can_be_exported_and_averaged_again(run, tmp_path):
    from checkpoint_tools import mcore_to_hf

    folder, _, _, _ = run
    average_steps.main(folder, "7500,75000", tmp_path / "checkpoints" / "step_000001", dtype="fp32")
    average_steps.main(tmp_path, "1", tmp_path / "again", dtype="fp32", format="hf")
    mcore_to_hf.main(tmp_path / "checkpoints" / "step_000001", tmp_path / "hf", dtype="fp32")
    assert (tmp_path / "hf" / SINGLE).read_bytes() == (tmp_path / "again" / SINGLE).read_bytes()


def test_weights_too_large_for_float16_are_refused_by_name(run, tmp_path):
    """A model that came in float16: its master weights are rounded to that, and to infinity only where told."""
    from checkpoint_tools import mcore_to_hf

    folder, model, masters, _ = run
    key = "decoder.final_layernorm.weight"
    large = masters[7500] | {key: masters[7500][key].clone()}
    large[key][3] = 65520.0
    stored = {"optimizer.state.fp32_param." + name: tensor for name, tensor in large.items()}
    step = write_step(tmp_path, folder / "origin", 1, model[7500] | stored, source_dtype="float16")
    with pytest.raises(
        ValueError, match=f"{key}: 1 of its 64 weights are too large for float16.*: use --dtype bf16 or"
    ):
        mcore_to_hf.main(step, tmp_path / "hf", num_workers=1)
    with pytest.raises(ValueError, match=f"{key}: 1 of its 64 weights are too large for float16"):
        average_steps.main(tmp_path, "1", tmp_path / "mean", format="hf", num_workers=1)
    large[key][3] = 65519.0
    stored = {"optimizer.state.fp32_param." + name: tensor for name, tensor in large.items()}
    step = write_step(tmp_path, folder / "origin", 2, model[7500] | stored, source_dtype="float16")
    mcore_to_hf.main(step, tmp_path / "hf", num_workers=1)
    average_steps.main(tmp_path, "2", tmp_path / "mean", format="hf", num_workers=1)
    for place in ("hf", "mean"):
        found = load_file(tmp_path / place / SINGLE)["model.norm.weight"]
        assert torch.equal(found, large[key].half()) and found[3] == 65504


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_happens_once_and_to_even(dtype):
    """Against exact arithmetic, at and around the ties where rounding by way of fp32 goes wrong."""
    near = torch.randn(2000).to(dtype).double()
    next_one = torch.nextafter(near.to(dtype), torch.tensor(torch.inf, dtype=dtype)).double()
    ties = (near + next_one) / 2
    values = torch.cat([ties * (1 + shift) for shift in (0, 2**-40, -(2**-40), 2**-25, -(2**-25))])
    values = torch.cat([values, torch.tensor([0.0, -0.0, 1e-300, -1e-300, 1e30, 65519.99999, 65520.0, 3e-8])])
    rounded = round_once(values, dtype)
    twice = values.float().to(dtype)
    assert (rounded != twice).sum() > 500
    for value, result in zip(values.tolist(), rounded, strict=True):
        if not torch.isfinite(result):
            assert abs(value) >= 65520
            continue
        neighbours = [torch.nextafter(result, torch.tensor(s * torch.inf, dtype=dtype)) for s in (-1, 1)]
        distance = abs(Fraction(value) - Fraction(result.item()))
        for other in (n for n in neighbours if torch.isfinite(n)):
            away = abs(Fraction(value) - Fraction(other.item()))
            even = not result.view(torch.int16).item() & 1
            assert distance < away or (distance == away and even), value


def random_bits(dtype: torch.dtype, count: int) -> torch.Tensor:
    """Numbers of all sizes, subnormal ones and both zeros among them, up to 2**100 or in fp16 2**14."""
    integer = {2: torch.int16, 4: torch.int32}[dtype.itemsize]
    bounds = torch.iinfo(integer)
    numbers = torch.randint(bounds.min, bounds.max, (count,), dtype=integer).view(dtype)
    most = 2.0 ** (14 if dtype == torch.float16 else 100)
    return torch.where(numbers.abs() < most, numbers, torch.zeros_like(numbers))


@pytest.mark.parametrize("one", [torch.bfloat16, torch.float32, torch.float16])
@pytest.mark.parametrize("other", [torch.bfloat16, torch.float32])
def test_the_mean_of_two_is_that_of_fp64(one, other):
    left, right = random_bits(one, 200_000), random_bits(other, 200_000)
    # Of like size, where sums fall on ties and close to them; of opposite sign; and any with any.
    scales = 1 + torch.cat([torch.arange(-8, 8) * 2.0**-shift for shift in range(4, 32)])
    near = (left[:50_000].double() * scales[torch.arange(50_000) % len(scales)]).to(other)
    right = torch.cat([near, -near, right[100_000:]])
    left = torch.cat([left[:50_000], left[:50_000], left[100_000:]])
    # Next to halfway between two of bf16, off by what fp32 loses.
    whole = left[:50_000].bfloat16()
    halfway = (whole.double() + torch.nextafter(whole, torch.tensor(torch.inf, dtype=whole.dtype)).double()) / 2
    little = halfway * torch.tensor([0.0, 2.0**-26, -(2.0**-26), 1.0])[torch.arange(50_000) % 4]
    left, right = (
        torch.cat([left, halfway.to(one), little.to(one)]),
        torch.cat([right, little.to(other), halfway.to(other)]),
    )
    found = mean_of_two(left, right)
    wanted = round_once((left.double() + right.double()) / 2, torch.bfloat16)
    assert torch.equal(found.view(torch.int16), wanted.view(torch.int16))
    if torch.float32 in (one, other):
        twice = ((left.double() + right.double()) / 2).float().bfloat16()
        assert (found != twice).sum() > 10_000
    large = torch.full((3,), 3e38)
    assert mean_of_two(large.to(one), large.to(other)) is None


def test_steps_are_matched_as_numbers(run):
    folder = run[0]
    assert [path.name for path in find_steps(folder, "75,1750000")] == ["step_000075", "step_1750000"]
    with pytest.raises(ValueError, match=r"no step 750, 7; steps that exist: 75, 7500, 75000, 750000, 1750000"):
        find_steps(folder, "75,750,7")
    with pytest.raises(ValueError, match="give step numbers separated by commas"):
        find_steps(folder, "75;7500")
    with pytest.raises(ValueError, match="named twice"):
        find_steps(folder, "75,075")
    with pytest.raises(ValueError, match="steps that exist: none"):
        find_steps(folder / "nowhere", "1")


def test_checkpoints_of_different_models_or_with_bad_numbers_are_refused(run, tmp_path):
    folder, model, _, _ = run
    origin = folder / "origin"
    other = save_model("qwen2_tied", tmp_path / "hf", dtype=torch.bfloat16, layers=1, rms_norm_eps=1e-5)
    hf_to_mcore.main(hf=other, output=tmp_path / "checkpoints" / "step_000001")
    write_step(tmp_path, origin, 2, model[75])
    fewer = dict(list(model[75].items())[1:])
    write_step(tmp_path, origin, 3, fewer)
    key = "decoder.final_layernorm.weight"
    write_step(tmp_path, origin, 4, {**model[75], key: torch.full_like(model[75][key], torch.nan)})
    write_step(tmp_path, origin, 5, model[75], source_dtype="float32")
    for steps, message in (
        ("1,2", "holds another model"),
        ("2,3", r"lacks 1 tensor\(s\) of qwen2: embedding.word_embeddings.weight"),
        ("2,4", f"{key} holds values that are not finite"),
        ("2,5", "come from models of different dtypes"),
    ):
        with pytest.raises(ValueError, match=message):
            average_steps.main(tmp_path, steps, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoints", "hf"]


def test_memory_does_not_grow_with_steps_or_tensors(tmp_path):
    """Peak memory of a worker averaging one and six checkpoints, each larger than what may be held at once."""
    run = tmp_path / "run"
    source = save_model("llama", tmp_path / "hf", dtype=torch.bfloat16, layers=1, vocab_size=60_000, hidden_size=256)
    hf_to_mcore.main(hf=source, output=run / "checkpoints" / "step_000001")
    for step in range(2, 7):
        target = run / "checkpoints" / f"step_{step:06d}"
        shutil.copytree(run / "checkpoints" / "step_000001", target, copy_function=os.link)
    code = """
import resource, sys
from pathlib import Path
from checkpoint_tools import average_steps
average_steps.main(Path(sys.argv[1]), "1", Path(sys.argv[2]) / "warm", num_workers=2)
before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
average_steps.main(Path(sys.argv[1]), "1,2,3,4,5,6", Path(sys.argv[2]) / "out", num_workers=2)
print(before, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code, str(run), str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    one, six = map(int, result.stdout.splitlines()[-1].split())  # KiB
    assert six - one < 30_000
    assert sum(file.stat().st_size for file in (tmp_path / "out" / "state").glob("__*_0.distcp")) > 60_000_000

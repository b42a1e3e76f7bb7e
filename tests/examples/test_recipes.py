"""Every recipe at its real size: it parses, its layout is allowed, and a rank of each stage fits an 80 GB GPU."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import pytest
import torch
import yaml

from data.preparation.where import Where
from engine.cli import parse_run, read_section
from engine.config import RunConfig
from engine.rehearsal.memory import StageMemory, plan_memory
from examples.evaluate import read_options
from examples.evaluation.options import check_options
from models.hf_config import describe
from tests.support.full_size import CONFIGS

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a plan is made where no GPU is visible")
ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "examples" / "recipes"
SHARED = {"common", "openmathreasoning", "openmathreasoning-round2"}  # bases that name no model
GIB = 2**30


@dataclass(frozen=True)
class Expected:
    """What a recipe must come to; memory in GiB of parameters, gradients and optimizer for each pipeline stage."""

    model: str
    ranks: int
    degrees: tuple[int, int, int, int]  # tp, cp, pp, ep
    batch: tuple[int, int]  # sequence length, global batch
    length: float  # steps, or epochs
    rates: tuple[float, float]  # peak and end
    memory: tuple[tuple[float, float, float], ...]


MATH_SMALL, MATH_7B, BASE_14B = ((2.88, 5.75, 0.03),), ((3.55, 7.09, 0.17),), ((3.44, 6.88, 0.32),)
REASONING = (32768, 1024)
ENDS, MIDDLE = (8.21, 16.41, 20.60), (7.13, 14.26, 20.20)
EXPECTED = {
    "openmathinstruct2-llama3.1-8b": Expected(
        "Llama-3.1-8B", 8, (2, 1, 1, 1), (4096, 512), 1, (2e-5, 0), ((7.48, 14.96, 11.22),)
    ),
    "openmathreasoning-qwen2.5-math-1.5b": Expected(
        "Qwen2.5-Math-1.5B", 512, (1, 2, 1, 1), REASONING, 30000, (3e-4, 3e-7), MATH_SMALL
    ),
    "openmathreasoning-qwen2.5-math-7b": Expected(
        "Qwen2.5-Math-7B", 512, (4, 2, 1, 1), REASONING, 30000, (2e-4, 2e-7), MATH_7B
    ),
    "openmathreasoning-qwen2.5-14b": Expected(
        "Qwen2.5-14B", 512, (8, 2, 1, 1), REASONING, 30000, (1e-4, 1e-7), BASE_14B
    ),
    "openmathreasoning-qwen2.5-32b": Expected(
        "Qwen2.5-32B", 512, (8, 4, 1, 1), REASONING, 30000, (1e-4, 1e-7), ((7.63, 15.26, 0.72),)
    ),
    "openmathreasoning-qwen2.5-math-1.5b-round2": Expected(
        "Qwen2.5-Math-1.5B", 512, (1, 2, 1, 1), REASONING, 3000, (3e-4, 3e-7), MATH_SMALL
    ),
    "openmathreasoning-qwen2.5-math-7b-round2": Expected(
        "Qwen2.5-Math-7B", 512, (4, 2, 1, 1), REASONING, 3000, (2e-4, 2e-7), MATH_7B
    ),
    "openmathreasoning-qwen2.5-14b-round2": Expected(
        "Qwen2.5-14B", 512, (8, 2, 1, 1), REASONING, 3000, (1e-4, 1e-7), BASE_14B
    ),
    "olmo2-7b-sft": Expected("OLMo-2-1124-7B", 8, (4, 1, 1, 1), (16384, 64), 2, (8e-5, 0), ((3.40, 6.80, 10.20),)),
    "olmo3-7b-sft": Expected("Olmo-3-1025-7B", 8, (4, 1, 1, 1), (32768, 32), 2, (1e-4, 0), ((3.40, 6.80, 10.20),)),
    "tulu3-8b": Expected("Llama-3.1-8B", 64, (2, 1, 1, 1), (4096, 128), 2, (5e-6, 0), ((7.48, 14.96, 1.40),)),
    "tulu3-olmo2-7b": Expected("OLMo-2-1124-7B", 64, (2, 1, 1, 1), (4096, 128), 2, (2e-5, 0), ((6.80, 13.60, 1.27),)),
    "tulu3-olmo2-13b": Expected("OLMo-2-1124-13B", 64, (4, 1, 1, 1), (4096, 64), 2, (5e-6, 0), ((6.39, 12.78, 2.40),)),
    "tulu3-olmo2-32b": Expected("OLMo-2-0325-32B", 64, (8, 1, 1, 1), (4096, 256), 2, (4e-6, 0), ((7.51, 15.01, 5.63),)),
    "numinamath-gpt-oss-120b": Expected(
        "gpt-oss-120b", 64, (1, 1, 4, 8), (8192, 128), 1, (2e-5, 0), (ENDS, MIDDLE, MIDDLE, ENDS)
    ),
    "numinamath-gpt-oss-20b": Expected(
        "gpt-oss-20b", 8, (1, 1, 1, 8), (8192, 64), 1, (2e-5, 0), ((7.80, 15.60, 29.22),)
    ),
}
ROUND_2 = [name for name in EXPECTED if name.endswith("round2")]


def parse(name: str) -> RunConfig:
    """The recipe as a user starts it."""
    return parse_run([str(FOLDER / f"{name}.yaml")])


@cache
def plan(name: str) -> tuple[StageMemory, ...]:
    """The plan of a recipe, which checks values, layout and sequence first."""
    config, expected = parse(name), EXPECTED[name]
    overrides = dataclasses.asdict(config.override)
    del overrides["resize_embeddings"]  # grows with the data's tokenizer
    return plan_memory(config, describe(CONFIGS[expected.model], overrides=overrides), expected.ranks)


def test_no_recipe_is_left_out():
    assert {path.stem for path in FOLDER.glob("*.yaml")} == {*EXPECTED, *SHARED}


@pytest.mark.parametrize("name", EXPECTED)
def test_a_recipe_says_what_the_published_run_did(name):
    config, expected = parse(name), EXPECTED[name]
    first_round = f"runs/{name.removesuffix('-round2')}/average"
    assert config.model == (first_round if name in ROUND_2 else f"{config.model.split('/')[0]}/{expected.model}")
    assert (config.tp, config.cp, config.pp, config.ep) == expected.degrees
    assert (config.seq_len, config.global_batch_size) == expected.batch
    assert (config.steps or config.epochs) == expected.length
    assert (config.optim.lr, config.optim.min_lr) == expected.rates
    assert config.precision == "bf16"


@pytest.mark.parametrize("name", EXPECTED)
def test_a_recipe_says_what_it_was_sized_for(name):
    header = re.split(r"^[^#]", (FOLDER / f"{name}.yaml").read_text(), maxsplit=1, flags=re.MULTILINE)[0]
    words = " ".join(header.replace("#", "").split())
    assert re.findall(r"Sized for (\d+) ranks", words) == [str(EXPECTED[name].ranks)]


@pytest.mark.parametrize("name", EXPECTED)
def test_a_rank_of_every_stage_holds_what_the_docs_say_and_fits(name):
    expected, stages = EXPECTED[name], plan(name)
    found = [(one.parameters / GIB, one.gradients / GIB, one.optimizer / GIB) for one in stages]
    assert found == [pytest.approx(stage, abs=0.006) for stage in expected.memory]
    assert max(one.total for one in stages) < 55 * GIB  # the rest of 80 GB (74.5 GiB) is for activations
    layout = " ".join(f"{n} {d}" for n, d in zip(("tp", "cp", "pp", "ep"), expected.degrees, strict=True) if d > 1)
    worst = max(stages, key=lambda one: one.total)
    parts = (worst.parameters, worst.gradients, worst.optimizer, worst.total)
    cells = [f"`{name}`", str(expected.ranks), layout, *(f"{part / GIB:.1f}" for part in parts)]
    assert f"| {' | '.join(cells)} |" in (ROOT / "docs" / "workflows.md").read_text()


def test_batches_and_optimizers_are_those_of_the_published_runs():
    instruct = parse("openmathinstruct2-llama3.1-8b").optim
    assert (instruct.schedule, instruct.beta1, instruct.beta2, instruct.eps) == ("constant", 0.9, 0.98, 1e-8)
    assert (instruct.weight_decay, instruct.clip_grad) == (0.01, 0)
    config = parse("openmathinstruct2-llama3.1-8b")
    assert (config.valid_every, config.valid_at_start, config.checkpoint.keep, config.seed) == (500, True, 0, 42)
    for name in (name for name in EXPECTED if name.startswith("openmathreasoning")):
        config = parse(name)
        rounds = 10 if name in ROUND_2 else 1
        assert (config.optim.schedule, config.optim.warmup_steps * rounds, config.optim.warmup_init) == (
            "cosine",
            3000,
            0,
        )
        adam = (config.optim.beta1, config.optim.beta2, config.optim.eps)
        assert (*adam, config.optim.weight_decay, config.optim.clip_grad) == (0.9, 0.98, 1e-8, 0.01, 0)
        assert (config.checkpoint.every * rounds, config.checkpoint.keep) == (7500, 0)
        math = "math" in name.removeprefix("openmathreasoning")
        override = (config.override.rope_theta, config.override.max_position_embeddings)
        assert override == ((500000, 131072) if math else (None, None))
    for name in ("olmo2-7b-sft", "olmo3-7b-sft"):
        config = parse(name)
        assert (config.batch_unit, config.seq_len * config.global_batch_size) == ("sequences", 1_048_576)
        assert (config.optim.schedule, config.optim.beta2, config.optim.clip_grad) == ("linear", 0.95, 1.0)
    for name in (name for name in EXPECTED if name.startswith("tulu3")):
        config = parse(name)
        assert (config.batch_unit, config.seed, config.optim.schedule) == ("conversations", 8, "linear")
        assert (config.optim.beta2, config.optim.weight_decay, config.optim.clip_grad) == (0.999, 0, 1.0)
        rows = 939_343 if name == "tulu3-8b" else 866_138
        assert config.optim.warmup_steps == round(0.03 * 2 * rows / config.global_batch_size)
    for name in (name for name in EXPECTED if name.startswith("numinamath")):
        config = parse(name)
        assert (config.batch_unit, config.optim.schedule, config.optim.weight_decay) == ("conversations", "linear", 0.1)
        assert config.optim.warmup_steps == round(0.03 * (859_494 + 72_441) / config.global_batch_size)


@pytest.mark.parametrize("name", EXPECTED)
def test_what_one_command_makes_is_what_the_next_one_takes(name):
    config, recipe = parse(name), [FOLDER / f"{name}.yaml"]
    prepared = read_section(recipe, "prepare")
    assert config.output == Path("runs") / name
    assert config.data == (prepared["output"],) == (f"runs/{name}/data",)
    assert config.valid == ((f"runs/{name}/data/valid",) if prepared.get("hold_out") else ())
    assert prepared["model"] == (None if name in ROUND_2 else config.model)
    if config.checkpoint.keep:
        made = read_section(recipe, "to_hf")
        assert made["checkpoint"] == f"runs/{name}"
    else:  # all checkpoints stay for the average, or as the source keeps them
        made = read_section(recipe, "average" if "reasoning" in name else "to_hf")
    if "reasoning" in name:
        steps = list(map(int, made["steps"].split(",")))
        assert steps == list(range(config.checkpoint.every, config.steps + 1, config.checkpoint.every))
        assert (made["run"], made["format"]) == (f"runs/{name}", "hf")
    options = read_options([str(*recipe)])
    assert (options.model, options.output) == (made["output"], Path("runs") / name / "evaluation")
    check_options(replace(options, model="HUB/NAME"))


def test_the_data_of_a_second_round_is_filtered_as_the_guide_recommends():
    sources = {
        source["name"]: source.get("where")
        for source in read_section([FOLDER / "openmathreasoning-qwen2.5-14b-round2.yaml"], "prepare")["sources"]
    }
    common = read_section([FOLDER / "openmathreasoning-qwen2.5-14b-round2.yaml"], "prepare")["where"]
    assert sources == {
        "cot": [*common, "tokens(generated_solution) >= 5000"],
        "tir": [*common, "tokens(generated_solution) >= 5000"],
        "genselect": None,  # those of all sources
    }
    row = {"problem_source": "aops_c6_high_school_olympiads", "pass_rate_72b_tir": "0.3"}
    keep = Where(tuple(common), len)
    assert keep(row)
    assert not keep(row | {"pass_rate_72b_tir": "n/a"}) and not keep(row | {"pass_rate_72b_tir": "0.31"})
    assert not keep(row | {"problem_source": "aops_c4_high_school_math"})


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.yaml")), ids=lambda path: path.stem)
def test_a_wrong_key_in_any_recipe_would_stop_it(path, tmp_path):
    content = yaml.safe_load(path.read_text()) | {"base": str(path), "global_batch": 1}
    (tmp_path / "wrong.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(ValueError, match="unknown recipe key global_batch; the nearest is global_batch_size"):
        parse_run([str(tmp_path / "wrong.yaml")])

"""Every named model at its real size, on the meta device: the tables against what transformers itself would write."""

import json
from collections import Counter, defaultdict
from itertools import pairwise

import pytest
import torch
from huggingface_hub import split_torch_state_dict_into_shards
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.core_model_loading import revert_weight_conversion

from models.conversion.hf_reader import INDEX
from models.conversion.hf_writer import HFWriter
from models.conversion.rules import RowRange
from models.description import ModelDescription
from models.hf_config import describe
from tests.support.full_size import CONFIGS, MXFP4, PARAMETERS

WHOLE = 2**62  # block bytes that cut nothing
# Tensors and bytes of the published quantised files.
MXFP4_FILES = {"gpt-oss-20b": (459, 13_761_264_768), "gpt-oss-120b": (687, 65_248_815_744)}


Shapes = dict[str, tuple[int, ...]]


def shapes_of_files(config: dict) -> Shapes:
    """What transformers writes for this config.json: experts in the files' form, a tied head once."""
    plain = {key: value for key, value in config.items() if key not in MXFP4}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**plain))
    tensors = revert_weight_conversion(model, model.state_dict())
    tied = set(model._tied_weights_keys or ()) if config["tie_word_embeddings"] else set()
    return {name: tuple(tensor.shape) for name, tensor in tensors.items() if name not in tied}


def shapes_of_rules(description: ModelDescription) -> Shapes:
    return {file: shape for rule in description.rules for file, shape in rule.files}


def size(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()


def covers(row_ranges: list[RowRange], height: int) -> bool:
    """Whether row_ranges read each of `height` rows once: one after the other, or interleaved."""
    bounds = sorted((row_range.start, row_range.stop, row_range.step) for row_range in row_ranges)
    turns = [(start, height, len(bounds)) for start in range(len(bounds))]
    ends = [0, *(stop for _, stop, _ in bounds)]
    adjacent = [(start, stop, 1) for start, stop in pairwise(ends)]
    return bounds == turns or (bounds == adjacent and ends[-1] == height)


@pytest.fixture(params=CONFIGS, scope="module")
def model(request):
    """(name, description, shapes that transformers writes) of one published model."""
    config = CONFIGS[request.param]
    return request.param, describe(config), shapes_of_files(config)


def test_each_tensor_of_the_files_is_matched_by_one_rule_of_its_shape(model):
    name, description, shapes = model
    assert set(Counter(file for rule in description.rules for file, _ in rule.files).values()) == {1}
    assert shapes_of_rules(description) == shapes
    assert sum(map(size, shapes.values())) == PARAMETERS[name]


def test_the_megatron_tensors_hold_every_row_once(model):
    name, description, shapes = model
    for rule in description.rules:
        read = defaultdict(list)
        for row_range in rule.row_ranges:
            read[row_range.name, row_range.expert].append(row_range)
        for (file, expert), row_ranges in read.items():
            matrix = shapes[file] if expert is None else shapes[file][1:]
            assert covers(row_ranges, matrix[-1] if rule.transposed else matrix[0]), (rule.key, file, expert)
    padding = description.padded_vocab_size - description.vocab_size
    tables = 1 if description.tied else 2
    padded = tables * padding * description.transformer["hidden_size"]
    assert sum(size(rule.shape) for rule in description.rules) == PARAMETERS[name] + padded


def test_the_way_back_gives_the_same_names_and_shapes(model):
    _, description, shapes = model
    rows: dict[str, int] = defaultdict(int)
    for rule in description.rules:
        tensor = torch.empty(rule.shape, dtype=torch.bfloat16, device="meta")
        for part in sorted(rule.export_blocks(itemsize=2, block_bytes=WHOLE), key=lambda part: (part.name, part.start)):
            block = part.lay_out(tensor[part.index])
            assert block.shape[1:] == shapes[part.name][1:], part.name
            assert part.start == rows[part.name], part.name  # where the block before it ended
            rows[part.name] += len(block)
    assert rows == {file: shape[0] for file, shape in shapes.items()}


def test_an_export_is_sharded_as_its_origin_or_as_transformers_would(model, tmp_path):
    name, description, shapes = model
    plan = {file: (shape, torch.bfloat16) for file, shape in shapes_of_rules(description).items()}
    # An origin whose files no rule of filling could guess: tensors interleaved.
    count = 7
    weight_map = {f: f"model-{n % count + 1:05d}-of-{count:05d}.safetensors" for n, f in enumerate(sorted(plan))}
    index = {"metadata": {"total_size": 2 * PARAMETERS[name]}, "weight_map": weight_map}
    (tmp_path / INDEX).write_text(json.dumps(index))
    assert HFWriter(tmp_path / "export", plan, like=tmp_path)._file == weight_map
    tensors = {file: torch.empty(shape, dtype=torch.bfloat16, device="meta") for file, shape in shapes.items()}
    wanted = split_torch_state_dict_into_shards(tensors, max_shard_size="5GB").tensor_to_filename
    in_their_order = {file: (shape, torch.bfloat16) for file, shape in shapes.items()}
    assert HFWriter(tmp_path / "export", in_their_order)._file == wanted


@pytest.mark.parametrize("name", MXFP4_FILES)
def test_mxfp4_files_hold_the_experts_matrices_as_blocks_and_scales(name):
    description = describe(CONFIGS[name])
    assert describe(CONFIGS[f"{name}-BF16"]).mxfp4 == ()
    assert len(description.mxfp4) == 2 * CONFIGS[name]["num_hidden_layers"]
    held: Shapes = {}
    for file, shape in shapes_of_rules(description).items():
        if file in description.mxfp4:
            experts, inputs, outputs = shape
            held[f"{file}_blocks"] = (experts, outputs, inputs // 32, 16)
            held[f"{file}_scales"] = (experts, outputs, inputs // 32)
        else:
            held[file] = shape
    width = {file: 1 if file.endswith(("_blocks", "_scales")) else 2 for file in held}
    assert (len(held), sum(size(shape) * width[file] for file, shape in held.items())) == MXFP4_FILES[name]

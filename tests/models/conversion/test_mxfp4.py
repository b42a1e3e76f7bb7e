"""MXFP4: values as transformers has them, slices, a whole model, bytes read, exact writing, and what is refused."""

import json
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Mxfp4Config

from checkpoint_tools import mcore_to_hf
from data.index import write_index
from engine.run_folder import RunFolder
from models.conversion.hf_reader import SINGLE, HFReader
from models.conversion.hf_writer import HFWriter
from models.conversion.mxfp4 import Mxfp4Reader, Mxfp4Writer, decode, encode, mxfp4_plan
from models.hf_config import describe
from models.model_directory import check_directory, open_reader, read_shard, weights_dtype
from tests.engine.checkpointing.test_resume import run
from tests.support.tiny import VOCABULARY, Memory, conversations, save_model

VALUES = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
HIDDEN, EXPERTS, LAYERS = 64, 8, 2
LAYER = "model.layers.1.mlp.experts."
BYTES = st.integers(0, 255)


def bits(tensor):
    return tensor.contiguous().view({2: torch.int16, 4: torch.int32}[tensor.element_size()])


def random_bytes(*shape, low=0, high=256, seed=0):
    return torch.randint(low, high, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def canonical(experts, rows, columns, seed):
    """Blocks and scales that `encode` gives again: in every group the first value is 4 or 6 or less than nothing."""
    blocks = random_bytes(experts, rows, columns // 32, 16, seed=seed)
    blocks[..., 0] |= 6  # the code of 4, or with its last bit that of 6
    return blocks, random_bytes(experts, rows, columns // 32, low=121, high=125, seed=seed)


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """A tiny gpt-oss model whose experts' matrices, square ones among them, are held in MXFP4."""
    folder = save_model("gpt_oss", tmp_path_factory.mktemp("packed"), dtype=torch.bfloat16, layers=LAYERS)
    tensors = load_file(folder / SINGLE)
    for layer in range(LAYERS):
        for seed, (name, rows) in enumerate((("gate_up_proj", 2 * HIDDEN), ("down_proj", HIDDEN))):
            name = f"model.layers.{layer}.mlp.experts.{name}"
            del tensors[name]
            blocks, scales = canonical(EXPERTS, rows, HIDDEN, seed=2 * layer + seed)
            tensors |= {name + "_blocks": blocks, name + "_scales": scales}
    save_file(tensors, folder / SINGLE, metadata={"format": "pt"})
    change_config(folder, quantization_config={"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]})
    return folder


def change_config(folder, **fields):
    config = json.loads((folder / "config.json").read_text()) | fields
    config = {name: value for name, value in config.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(config))


def copy(packed, folder, change=lambda tensors: {}, **fields):
    """The packed model with some tensors replaced, None for those to take away, and fields of config.json too."""
    folder.mkdir(exist_ok=True)
    tensors = load_file(packed / SINGLE)
    tensors |= change(tensors)
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, folder / SINGLE)
    (folder / "config.json").write_bytes((packed / "config.json").read_bytes())
    change_config(folder, **fields)
    return folder


def test_every_code_at_every_scale_is_what_transformers_makes_of_it():
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    blocks = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 256, 16, 16).contiguous()
    scales = torch.arange(256, dtype=torch.uint8).view(1, 256, 1).expand(1, 256, 16).contiguous()
    found = Mxfp4Reader(Memory({"w_blocks": blocks, "w_scales": scales}), ["w"]).read("w")
    assert found.shape == (1, 512, 256)
    assert torch.equal(bits(found), bits(convert_moe_packed_tensors(blocks, scales)))
    wide = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
    assert torch.equal(bits(found.float()), bits(wide))
    # Byte 0x92 at a scale of one: its lower half, code 2, comes first.
    assert found[0, 2 * 0x92 : 2 * 0x92 + 2, 127].tolist() == [1.0, -0.5]
    assert found[0, 2:4, 0].tolist() == [2.0**-128, 0.0]


@settings(deadline=None, max_examples=100)
@given(data=st.data())
def test_any_slice_is_that_slice_of_the_whole(data):
    shape = (3, 96, 7)
    tensors = {"w_blocks": random_bytes(3, 7, 3, 16), "w_scales": random_bytes(3, 7, 3, low=100, high=150)}
    reader = Mxfp4Reader(Memory(tensors | {"plain": torch.arange(6.0)}), ["w"])
    whole = reader.read("w")
    assert (reader.names(), reader.shape("w"), reader.dtype("w")) == (["plain", "w"], shape, torch.bfloat16)
    index = tuple(
        slice(
            data.draw(st.none() | st.integers(0, size)),
            data.draw(st.none() | st.integers(0, size + 1)),
            data.draw(st.none() | st.integers(1, 4)),
        )
        for size in shape[: data.draw(st.integers(0, 3))]
    )
    assert torch.equal(reader.read("w", index), whole[index])
    turned = torch.full_like(whole[index].mT.contiguous(), 99)
    assert reader.read("w", index, turned.mT).data_ptr() == turned.data_ptr()
    assert torch.equal(turned.mT, whole[index])
    assert torch.equal(reader.read("plain", (slice(1, 5, 2),)), torch.tensor([1.0, 3.0]))


def test_a_rank_reads_only_the_bytes_of_its_experts_and_groups():
    tensors = Memory({"w_blocks": random_bytes(8, 64, 4, 16), "w_scales": random_bytes(8, 64, 4)})
    reader = Mxfp4Reader(tensors, ["w"])
    reader.read("w", (slice(2, 4),))
    assert tensors.read_bytes == {"w_blocks": 2 * 64 * 4 * 16, "w_scales": 2 * 64 * 4}
    # Columns 40 to 69 lie in two groups; every second row of 64.
    reader.read("w", (slice(0, 1), slice(40, 70), slice(1, 64, 2)))
    assert tensors.read_bytes["w_blocks"] - 2 * 64 * 4 * 16 == 32 * 2 * 16
    assert tensors.read_bytes["w_scales"] - 2 * 64 * 4 == 32 * 2


@settings(deadline=None, max_examples=50)
@given(data=st.data())
def test_any_box_of_experts_is_that_box_of_the_whole(packed, data):
    """As data-parallel ranks read them: parts of interleaved rows, columns from the middle of a group to another's."""
    description = describe(packed)
    reader = open_reader(packed, description)
    for key in ("decoder.layers.1.mlp.experts.linear_fc1.weight", "decoder.layers.0.mlp.experts.linear_fc2.weight"):
        rule = description.rule[key]
        offsets = [data.draw(st.integers(0, size - 1)) for size in rule.shape]
        lengths = [data.draw(st.integers(1, size - offset)) for size, offset in zip(rule.shape, offsets, strict=True)]
        box = tuple(slice(offset, offset + n) for offset, n in zip(offsets, lengths, strict=True))
        assert torch.equal(bits(read_shard(description, reader, key, offsets, lengths)), bits(rule.read(reader)[box]))


def test_a_model_read_by_its_rules_has_the_logits_that_transformers_gives_it(packed):
    from transformers import AutoConfig, AutoModelForCausalLM, Mxfp4Config

    description = describe(packed)
    reader = open_reader(packed, description)
    assert check_directory(description, reader) == ()
    assert weights_dtype(packed) == torch.bfloat16
    # Said to dequantise, which it does by itself only where it finds no GPU or no kernels for one.
    theirs = AutoModelForCausalLM.from_pretrained(packed, quantization_config=Mxfp4Config(dequantize=True))
    assert theirs.model.layers[1].mlp.experts.down_proj.dtype == torch.bfloat16
    tensors = {}
    for rule in description.rules:
        tensors.update(rule.split(rule.read(reader)))
    config = AutoConfig.from_pretrained(packed)
    del config.quantization_config
    ours = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    tokens = torch.arange(40)[None] * 7 % 131

    def logits(model):
        with torch.no_grad():
            return model(input_ids=tokens).logits

    ours.load_state_dict(tensors)
    expected = logits(theirs)
    assert expected.std() > 0.3
    assert torch.equal(bits(logits(ours)), bits(expected))
    # A square matrix transposed keeps its shape; only this comparison sees it.
    ours.load_state_dict(tensors | {LAYER + "down_proj": tensors[LAYER + "down_proj"].mT})
    assert (logits(ours) - expected).abs().max() > 0.1


def test_an_expert_parallel_rank_gets_its_experts_and_nothing_else_is_read(packed):
    description = describe(packed)
    files = Memory(load_file(packed / SINGLE))
    reader = Mxfp4Reader(files, description.mxfp4)
    rule = description.rule["decoder.layers.1.mlp.experts.linear_fc1.weight"]
    part = rule.read(reader, (slice(2, 4),))
    expected = 2 * 2 * HIDDEN * HIDDEN
    assert part.shape == (2, 2 * HIDDEN, HIDDEN)
    read = {name: count for name, count in files.read_bytes.items() if count}
    assert read == {LAYER + "gate_up_proj_blocks": expected // 2, LAYER + "gate_up_proj_scales": expected // 32}
    assert torch.equal(part, rule.read(reader)[2:4])
    # Gates, the even rows of the file, stand above ups.
    up = decode(files[LAYER + "gate_up_proj_blocks"][3, 1::2], files[LAYER + "gate_up_proj_scales"][3, 1::2])
    assert torch.equal(part[1, HIDDEN:], up)


def without(*names):
    return lambda tensors: dict.fromkeys([LAYER + name for name in names])


def plain(*names):
    def change(tensors):
        found = [name.removesuffix("_blocks") for name in tensors if name.endswith("_blocks")]
        chosen = [name for name in found if name.endswith(names)]
        made = {n: decode(tensors[n + "_blocks"], tensors[n + "_scales"]).mT.contiguous() for n in chosen}
        return made | dict.fromkeys([name + end for name in chosen for end in ("_blocks", "_scales")])

    return change


@pytest.mark.parametrize(
    ("change", "fields", "message"),
    [
        (without("down_proj_scales"), {}, f"holds {LAYER}down_proj_blocks without {LAYER}down_proj_scales"),
        (without("down_proj_blocks"), {}, f"holds {LAYER}down_proj_scales without {LAYER}down_proj_blocks"),
        (
            lambda tensors: {LAYER + "down_proj_blocks": tensors[LAYER + "down_proj_blocks"][:, :-1].contiguous()},
            {},
            r"down_proj_blocks \[8, 63, 2, 16\] and .*down_proj_scales \[8, 64, 2\] are not \[experts",
        ),
        (
            lambda tensors: {LAYER + "down_proj_scales": tensors[LAYER + "down_proj_scales"].flatten(1)},
            {},
            r"down_proj_scales \[8, 128\] are not \[experts, rows, groups, 16\]",
        ),
        (
            lambda tensors: {LAYER + "down_proj_scales": tensors[LAYER + "down_proj_scales"].float()},
            {},
            "down_proj_scales has dtype torch.float32, and MXFP4 is held in bytes",
        ),
        (plain(LAYER + "down_proj"), {}, f"holds {LAYER}down_proj plain and model.layers.0.*down_proj in MXFP4"),
        (plain("gate_up_proj", "down_proj"), {}, "model.layers.0.mlp.experts.down_proj plain: remove quantization_co"),
        (lambda tensors: {}, {"quantization_config": None}, "down_proj_blocks in MXFP4, but its config.json has no "),
    ],
)
def test_a_directory_that_is_no_whole_mxfp4_is_refused(packed, tmp_path, change, fields, message):
    folder = copy(packed, tmp_path, change, **fields)
    with pytest.raises(ValueError, match=message):
        open_reader(folder, describe(folder))


def test_missing_and_misshapen_tensors_are_still_seen_through_the_reader(packed, tmp_path):
    folder = copy(packed, tmp_path / "missing", without("down_proj_scales", "down_proj_blocks"))
    description = describe(folder)
    with pytest.raises(ValueError, match=rf"lacks 1 tensor\(s\): {LAYER}down_proj$"):
        check_directory(description, open_reader(folder, description))
    blocks, scales = canonical(EXPERTS, HIDDEN, 32, seed=1)
    narrow = {LAYER + "down_proj_blocks": blocks, LAYER + "down_proj_scales": scales}
    folder = copy(packed, tmp_path / "narrow", lambda tensors: narrow)
    with pytest.raises(ValueError, match=r"down_proj \[8, 32, 64\] instead of \[8, 64, 64\]"):
        check_directory(description, open_reader(folder, description))


def test_source_dtype_knows_mxfp4_by_its_names_and_other_bytes_not(packed, tmp_path):
    with pytest.raises(ValueError, match=f"{LAYER}down_proj_blocks without"):
        weights_dtype(copy(packed, tmp_path / "a", without("down_proj_scales")))
    with pytest.raises(ValueError, match="1 x torch.uint8"):
        weights_dtype(copy(packed, tmp_path / "b", lambda tensors: {"mask": torch.zeros(3, dtype=torch.uint8)}))
    with pytest.raises(ValueError, match="1 x torch.float32"):
        weights_dtype(copy(packed, tmp_path / "c", lambda tensors: {"lm_head.weight": torch.zeros(131, HIDDEN)}))


@settings(deadline=None, max_examples=100)
@given(
    codes=st.lists(st.lists(st.integers(0, 15), min_size=32, max_size=32), min_size=1, max_size=6),
    scale=BYTES,
    dtype=st.sampled_from([torch.bfloat16, torch.float32]),
)
def test_what_is_encoded_decodes_to_the_same_bits(codes, scale, dtype):
    codes = torch.tensor(codes, dtype=torch.uint8)[None]  # [1, rows, 32]
    blocks = (codes[..., 0::2] | codes[..., 1::2] << 4)[:, :, None]
    scales = torch.full((1, codes.shape[1], 1), scale, dtype=torch.uint8)
    values = decode(blocks, scales).to(dtype)
    if not values.isfinite().all():
        with pytest.raises(ValueError, match="without loss"):
            encode(values)
        return
    again_blocks, again_scales = encode(values)
    assert torch.equal(bits(decode(again_blocks, again_scales).to(dtype)), bits(values))
    # The specification's scale, and none below 2 ** -127.
    largest = values.abs().amax(-1).double()
    expected = (torch.where(largest > 0, largest, 2.0**-200).log2().floor() - 2 + 127).clamp(min=0)
    assert torch.equal(again_scales[..., 0].double(), expected)
    once_more = encode(decode(again_blocks, again_scales))
    assert torch.equal(once_more[0], again_blocks) and torch.equal(once_more[1], again_scales)


def test_encoding_gives_back_the_bytes_of_a_canonical_file_with_its_zeros_and_signs():
    blocks, scales = canonical(3, 5, 96, seed=9)
    blocks[1, 2], scales[1, 2] = 0x80, 0  # zeros and negative zeros interleaved
    found = encode(decode(blocks, scales))
    assert torch.equal(found[0], blocks) and torch.equal(found[1], scales)
    # One expert's matrix, and a group at either end of what has a code.
    values = torch.tensor([[*VALUES, *(-v for v in VALUES)] * 2])
    for exponent, scale in ((125, 252), (0, 127), (-127, 0)):
        found = encode(torch.ldexp(values, torch.tensor(exponent)))
        assert found[1].tolist() == [[scale]]
        assert found[0].tolist() == [[[0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE] * 2]]


@pytest.mark.parametrize(
    ("changes", "count"),
    [
        ({0: 5.0}, 1),
        ({0: 0.25, 31: 4.0}, 1),
        ({0: 1.0 + 2.0**-20}, 1),
        ({3: float("inf")}, 1),
        ({3: float("nan")}, 1),
        ({3: 3.4e38}, 1),
        ({0: 2.0**-140}, 1),
        ({0: 2.0**-140, 1: 2.0**126}, 1),
        ({0: 1.75, 5: 1.25, 9: -1.75}, 3),
    ],
)
def test_values_that_mxfp4_cannot_hold_are_refused_and_counted(changes, count):
    values = torch.zeros(2, 64)
    values[1, list(changes)] = torch.tensor(list(changes.values()))
    with pytest.raises(ValueError, match=rf"w cannot be written .* change {count} of its 128 values: use --dtype bf16"):
        encode(values, "w")
    with pytest.raises(ValueError, match="w has 48 columns"):
        encode(values[:, :48], "w")


def test_an_export_writes_the_files_that_it_was_read_from(packed, tmp_path):
    description = describe(packed)
    reader = open_reader(packed, description)
    shapes = {name: shape for rule in description.rules for name, shape in rule.hf_shapes().items()}
    plan = mxfp4_plan({name: (shape, torch.bfloat16) for name, shape in shapes.items()}, description.mxfp4)
    files = HFReader(packed)
    assert plan == {name: (files.shape(name), files.dtype(name)) for name in files.names()}
    with HFWriter(tmp_path, plan) as writer:
        out = Mxfp4Writer(writer, description.mxfp4)
        for rule in description.rules:
            for part in rule.export_blocks(2, 2**12):
                out.write(part.name, part.lay_out(rule.read(reader, part.index)), part.start)
    before, after = load_file(packed / SINGLE), load_file(tmp_path / SINGLE)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    trained = SimpleNamespace(write=lambda *_: pytest.fail("something was written"))
    with pytest.raises(ValueError, match=f"{LAYER}down_proj cannot be written in MXFP4"):
        Mxfp4Writer(trained, description.mxfp4).write(LAYER + "down_proj", torch.rand(1, HIDDEN, HIDDEN).bfloat16())


def test_a_run_that_learns_nothing_gives_back_its_mxfp4_files(pool, packed, tmp_path):
    """Expert-parallel ranks read slices of blocks; bf16 comes out unless MXFP4 is asked for."""
    write_index(tmp_path / "data", conversations(8).documents, vocab_size=VOCABULARY)
    fixed = ["--model", packed, "--data", tmp_path / "data", "--output", tmp_path / "run", "--optim.weight-decay", "0"]
    shape = "--seq-len 96 --global-batch-size 4 --steps 1 --precision bf16 --optim.lr 0 --ep 2 --pp 2"
    pool.run(run, 4, [*map(str, fixed), *shape.split()])
    checkpoint = RunFolder(tmp_path / "run").checkpoint(1)
    mcore_to_hf.main(checkpoint=checkpoint, output=tmp_path / "again", dtype="mxfp4")
    found, wanted = load_file(tmp_path / "again" / SINGLE), load_file(packed / SINGLE)
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        if name.endswith("_blocks"):  # an update by zero turns -0 into 0
            scales = name.replace("_blocks", "_scales")
            assert torch.equal(decode(found[name], found[scales]), decode(tensor, wanted[scales])), name
        else:
            assert torch.equal(found[name], tensor), name
    assert (tmp_path / "again" / "config.json").read_bytes() == (packed / "config.json").read_bytes()
    mcore_to_hf.main(checkpoint=checkpoint, output=tmp_path / "plain")
    assert "quantization_config" not in json.loads((tmp_path / "plain" / "config.json").read_text())
    assert {HFReader(tmp_path / "plain").dtype(name) for name in HFReader(tmp_path / "plain").names()} == {
        torch.bfloat16
    }
    tokens = torch.arange(20)[None]
    eager = {"attn_implementation": "eager", "dtype": torch.bfloat16}
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", **eager)
    source = AutoModelForCausalLM.from_pretrained(packed, quantization_config=Mxfp4Config(dequantize=True), **eager)
    assert torch.equal(plain(tokens).logits, source(tokens).logits)
    moved = [*map(str, fixed), *shape.replace("--optim.lr 0", "--optim.lr 1e-3").split(), "--checkpoint.no-resume"]
    pool.run(run, 4, moved)
    with pytest.raises(ValueError, match="cannot be written in MXFP4 without loss"):
        mcore_to_hf.main(checkpoint=checkpoint, output=tmp_path / "moved", dtype="mxfp4")
    assert not (tmp_path / "moved").exists()

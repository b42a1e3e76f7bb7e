"""Conversion both ways: bitwise round trips, what megatron-core loads, and inputs that are refused."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from checkpoint_tools import hf_to_mcore, inspect_checkpoint, mcore_to_hf
from data.checksums import SUMS
from engine.checkpointing.directory import MANIFEST, complete_or_absent, read_manifest, write_manifest
from engine.checkpointing.export_sums import LIST
from engine.checkpointing.hf_export import Export, change_config, open_checkpoint
from engine.checkpointing.store_reader import StoreReader
from engine.checkpointing.store_writer import write_store
from models.conversion.hf_reader import INDEX, SINGLE, HFReader
from models.hf_config import describe
from tests.support.tiny import save_model

ROOT = Path(__file__).parents[2]
MODELS = {"llama": {"head_dim": 12}, "qwen2_tied": {"vocab_size": 1003}, "qwen2_untied": {}}


def add_tokenizer(folder: Path) -> None:
    """A trained tokenizer with a chat template, and a generation config with an end token of its own."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import GenerationConfig, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=120, special_tokens=["<unk>", "<end>"])
    tokenizer.train_from_iterator(["two and two make four", "größer als drei"], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<end>")
    fast.chat_template = "{% for m in messages %}{{ m['content'] }}<end>{% endfor %}"
    fast.save_pretrained(folder)
    GenerationConfig(eos_token_id=[1, 2], temperature=0.6, do_sample=True).save_pretrained(folder)


@pytest.fixture(scope="module", params=list(MODELS))
def model(request, tmp_path_factory):
    """(Hugging Face directory in bf16, its checkpoint)."""
    folder = tmp_path_factory.mktemp(request.param)
    source = save_model(request.param, folder / "hf", dtype=torch.bfloat16, layers=2, **MODELS[request.param])
    add_tokenizer(source)
    hf_to_mcore.main(hf=source, output=folder / "step_000000")
    return source, folder / "step_000000"


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """(Hugging Face directory in fp32, its checkpoint), of a llama with one layer."""
    folder = tmp_path_factory.mktemp("small")
    save_model("llama", folder / "hf", layers=1)
    hf_to_mcore.main(hf=folder / "hf", output=folder / "checkpoint")
    return folder / "hf", folder / "checkpoint"


def script(name: str, *arguments, limit: int | None = None) -> subprocess.CompletedProcess:
    """Run a script of checkpoint_tools as a user does; `limit` is the largest file it may write."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "checkpoint_tools" / name), *map(str, arguments)]

    def restrict() -> None:
        import signal

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    start = restrict if limit else None
    return subprocess.run(command, env=environment, capture_output=True, text=True, preexec_fn=start)


def tree(folder: Path) -> dict[str, bytes]:
    """All files of a directory but for the checksums that our exports have."""
    files = [file for file in folder.rglob("*") if file.is_file() and file.suffix != SUMS and file.name != LIST]
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


def test_there_and_back_gives_the_same_files(model, tmp_path):
    source, checkpoint = model
    mcore_to_hf.main(checkpoint=checkpoint, output=tmp_path / "back")
    before, after = tree(source), tree(tmp_path / "back")
    assert after.keys() == before.keys()
    assert {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"} < after.keys()
    assert [name for name in before if before[name] != after[name]] == []


OTHERS = {
    "qwen3_moe": {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "norm_topk_prob": True},
    "olmo2": {},
    "olmo3": {"sliding_window": 8},
    "gpt_oss": {"num_local_experts": 8, "num_experts_per_tok": 2, "head_dim": 8},
}


def save_other(kind: str, folder: Path) -> Path:
    """A random bf16 model of a family with experts, post-norms or sinks."""
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "vocab_size": 131}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 256}
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**sizes, **heads, **OTHERS[kind]}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter))
    model.to(torch.bfloat16).save_pretrained(folder, max_shard_size="100KB")
    return folder


@pytest.mark.parametrize("kind", OTHERS)
def test_experts_norms_and_sinks_go_there_and_back(kind, tmp_path):
    """By one process and by three: the same tensors, and every file of the source bit for bit."""
    source = save_other(kind, tmp_path / "hf")
    rules, reader = describe(source).rules, HFReader(source)
    for workers in (1, 3):
        checkpoint, back = tmp_path / f"checkpoint{workers}", tmp_path / f"back{workers}"
        hf_to_mcore.main(source, checkpoint, workers)
        store = StoreReader(checkpoint / "state")
        for rule in rules:
            whole = rule.read(reader)
            assert torch.equal(store.read(rule.key), whole), rule.key
            if len(rule.shape) == 3:
                box = (slice(2, 5), slice(3, 31), slice(4, 9))
                assert torch.equal(store.read(rule.key, box), whole[box])
        mcore_to_hf.main(checkpoint, back, num_workers=workers)
        assert tree(back) == tree(source)
    assert any(len(rule.shape) == 3 for rule in rules) == (kind in ("qwen3_moe", "gpt_oss"))


def test_shares_of_an_export_are_written_apart(model, tmp_path):
    """As the ranks of a job do it: one begins, each writes its share, one finishes; a missing share is named."""
    source, checkpoint = model
    opened = open_checkpoint(checkpoint)
    job = Export(
        output=tmp_path,
        description=opened.description,
        dtype=torch.bfloat16,
        side_files=checkpoint / "hf",
        block_bytes=1000,
    )
    job.begin()
    written = [job.write_share(opened.reader(torch.bfloat16), (rank, 3)) for rank in (2, 0, 1)]
    with pytest.raises(ValueError, match=r"tensor\(s\) were not written: model"):
        job.finish(written[1:])
    job.finish(written)
    assert tree(tmp_path) == tree(source)
    assert sum(sum(counts.values()) for counts in written) == job.total_bytes


def test_config_fields_are_set_and_removed(tmp_path):
    text = '{"torch_dtype": "bfloat16",  "quantization_config": {"quant_method": "mxfp4"}}'
    (tmp_path / "config.json").write_text(text)
    change_config(tmp_path, {"dtype": None}, remove=["nothing"])
    assert (tmp_path / "config.json").read_text() == text
    change_config(tmp_path, {"dtype": "float32"}, remove=["quantization_config"])
    assert json.loads((tmp_path / "config.json").read_text()) == {"torch_dtype": "float32"}


def test_a_sharded_model_keeps_its_files_and_index(model, tmp_path):
    from transformers import AutoModelForCausalLM

    source, _ = model
    AutoModelForCausalLM.from_pretrained(source).save_pretrained(tmp_path / "hf", max_shard_size="60KB")
    hf_to_mcore.main(hf=tmp_path / "hf", output=tmp_path / "checkpoint")
    mcore_to_hf.main(checkpoint=tmp_path / "checkpoint", output=tmp_path / "back")
    assert INDEX in tree(tmp_path / "back")
    assert tree(tmp_path / "back") == tree(tmp_path / "hf")


def test_transformers_loads_the_export_without_a_warning(model, tmp_path):
    source, checkpoint = model
    mcore_to_hf.main(checkpoint=checkpoint, output=tmp_path / "back", dtype="fp32", max_sequence_length=77)
    code = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
one, two = (AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32) for path in sys.argv[1:])
tokens = torch.arange(40)[None]
assert torch.equal(one(tokens).logits, two(tokens).logits)
assert one.state_dict().keys() == two.state_dict().keys()
assert two.config.max_position_embeddings == 77 and two.config.vocab_size == one.config.vocab_size
assert two.config.dtype == torch.float32 and one.config.rope_parameters == two.config.rope_parameters
assert GenerationConfig.from_pretrained(sys.argv[2]).eos_token_id == [1, 2]
chat = [{"role": "user", "content": "two and two"}]
first, second = (AutoTokenizer.from_pretrained(p).apply_chat_template(chat) for p in sys.argv[1:])
assert first == second
"""
    command = [sys.executable, "-c", code, str(source), str(tmp_path / "back")]
    environment = {**os.environ, "TQDM_DISABLE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert (result.returncode, result.stderr) == (0, "")


def test_the_checkpoint_says_what_it_holds(model):
    source, checkpoint = model
    meta = read_manifest(checkpoint)
    description = describe(source)
    assert (meta["format"], meta["step"], meta["source_dtype"]) == (1, 0, "bfloat16")
    assert (meta["vocab_size"], meta["padded_vocab_size"]) == (
        description.vocab_size,
        description.padded_vocab_size,
    )
    assert (meta["family"], meta["tied"]) == (description.family, description.tied)
    store, reader = StoreReader(checkpoint / "state"), HFReader(source)
    assert store.keys() == sorted(rule.key for rule in description.rules)
    for rule in description.rules:
        whole = rule.read(reader)
        assert torch.equal(store.read(rule.key), whole)
        assert torch.equal(store.read(rule.key, (slice(3, 11),)), whole[3:11])


def test_inspect_counts_parameters(model, capsys):
    source, checkpoint = model
    numel = sum(torch.Size(HFReader(source).shape(name)).numel() for name in HFReader(source).names())
    inspect_checkpoint.main(source)
    assert f"{len(HFReader(source).names())} tensors, {numel:,} parameters" in capsys.readouterr().out
    inspect_checkpoint.main(checkpoint, match="*linear_fc1.weight")
    out = capsys.readouterr().out
    assert "decoder.layers.1.mlp.linear_fc1.weight  bfloat16  [192, 64]" in out
    assert "2 tensors, 24,576 parameters" in out


def with_masters(checkpoint: Path, target: Path, prefix: str) -> dict[str, torch.Tensor]:
    """A copy of a checkpoint with fp32 master weights that its model weights do not hold."""
    store = StoreReader(checkpoint / "state")
    masters = {rule.key: torch.randn(rule.shape) for rule in describe(checkpoint / "hf").rules}
    shutil.copytree(checkpoint, target, ignore=shutil.ignore_patterns("state", MANIFEST))
    layout = {key: (store.shape(key), store.dtype(key)) for key in masters}
    model = [(key, *layout[key], lambda rows, key=key: store.read(key, (rows,))) for key in masters]
    optimizer = [(prefix + key, m.shape, m.dtype, m.__getitem__) for key, m in masters.items()]
    write_store(target / "state", model + optimizer)
    write_manifest(target, {k: v for k, v in read_manifest(checkpoint).items() if k != "files"})
    return masters


@pytest.mark.parametrize("prefix", ["optimizer.state.param.", "optimizer.state.fp32_param."])
def test_fp32_exports_come_from_the_master_weights_and_others_do_not(model, tmp_path, prefix):
    source, checkpoint = model
    masters = with_masters(checkpoint, tmp_path / "trained", prefix)
    mcore_to_hf.main(checkpoint=tmp_path / "trained", output=tmp_path / "fp32", dtype="fp32")
    mcore_to_hf.main(checkpoint=tmp_path / "trained", output=tmp_path / "source")
    exported = load_file(tmp_path / "fp32" / SINGLE)
    for rule in describe(source).rules:
        for name, part in rule.split(masters[rule.key]):
            assert torch.equal(exported.pop(name), part), name
    assert not exported
    assert (tmp_path / "source" / SINGLE).read_bytes() == (source / SINGLE).read_bytes()
    assert json.loads((tmp_path / "fp32" / "config.json").read_text())["dtype"] == "float32"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: (path / MANIFEST).unlink(), "it has no lathe.json"),
        (lambda path: (path / "state" / "__0_0.distcp").unlink(), "state/__0_0.distcp is missing"),
        (lambda path: os.truncate(path / "state" / "__0_0.distcp", 1000), "has 1000 bytes instead of"),
        (lambda path: (path / "hf" / "config.json").unlink(), "hf/config.json is missing"),
        (lambda path: (path / MANIFEST).write_text("{}"), "lathe.json is damaged"),
        (lambda path: (path / MANIFEST).write_text('{"format": 2, "files": {}}'), "has format 2"),
    ],
)
def test_a_half_written_checkpoint_is_refused(small, tmp_path, damage, message):
    checkpoint = shutil.copytree(small[1], tmp_path / "checkpoint")
    damage(checkpoint)
    with pytest.raises(ValueError, match=message):
        mcore_to_hf.main(checkpoint=checkpoint, output=tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_a_checkpoint_whose_tensors_do_not_fit_is_refused(small, tmp_path):
    source, _ = small
    rules = describe(source).rules
    shutil.copytree(small[1], tmp_path / "c", ignore=shutil.ignore_patterns("state"))
    meta = json.loads((tmp_path / "c" / MANIFEST).read_text())

    def rewrite(shapes: dict) -> None:
        shutil.rmtree(tmp_path / "c" / "state", ignore_errors=True)
        specs = [(k, s, torch.float32, lambda r, s=s: torch.zeros(s)[r]) for k, s in shapes.items()]
        write_store(tmp_path / "c" / "state", specs)
        write_manifest(tmp_path / "c", meta)

    shapes = {rule.key: rule.shape for rule in rules}
    for changed, message in (
        (
            {**shapes, "decoder.layers.0.gate": (3,)},
            r"has unknown 1 tensor\(s\) of llama: decoder.layers.0.gate",
        ),
        (dict(list(shapes.items())[1:]), r"lacks 1 tensor\(s\) of llama: embedding.word_embeddings.weight"),
        ({**shapes, "decoder.final_layernorm.weight": (65,)}, r"has shape \[65\] instead of \[64\]"),
    ):
        rewrite(changed)
        with pytest.raises(ValueError, match=message):
            mcore_to_hf.main(checkpoint=tmp_path / "c", output=tmp_path / "back")


def test_a_directory_with_a_missing_or_an_extra_tensor_is_refused(small, tmp_path):
    source = shutil.copytree(small[0], tmp_path / "hf")
    tensors = load_file(source / SINGLE)
    save_file({**tensors, "model.layers.0.extra": torch.zeros(1)}, source / SINGLE)
    with pytest.raises(ValueError, match="no rule of llama matches: model.layers.0.extra"):
        hf_to_mcore.main(hf=source, output=tmp_path / "out")
    tensors.pop("model.norm.weight")
    save_file(tensors, source / SINGLE)
    with pytest.raises(ValueError, match=r"lacks 1 tensor\(s\): model.norm.weight"):
        hf_to_mcore.main(hf=source, output=tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_an_output_that_holds_something_is_left_alone(small, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="exists already and is not an empty directory"):
        hf_to_mcore.main(hf=small[0], output=tmp_path)
    with pytest.raises(ValueError, match="exists already and is not an empty directory"):
        mcore_to_hf.main(checkpoint=small[1], output=tmp_path)
    assert tree(tmp_path) == {"notes.txt": b"mine"}
    (tmp_path / "empty").mkdir()
    hf_to_mcore.main(hf=small[0], output=tmp_path / "empty")
    assert read_manifest(tmp_path / "empty")["family"] == "llama"


def test_an_interrupted_write_leaves_nothing(tmp_path):
    with pytest.raises(KeyboardInterrupt), complete_or_absent(tmp_path / "out") as partial:
        (partial / "half").write_text("x")
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_a_users_mistake_is_one_sentence(small, tmp_path):
    result = script("hf_to_mcore.py", "--hf", tmp_path / "nowhere", "--output", tmp_path / "out")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert "nowhere is not a Hugging Face model directory" in result.stderr


def test_a_full_disk_leaves_nothing_and_says_so(small, tmp_path):
    for name, flag, source in (
        ("hf_to_mcore.py", "--hf", small[0]),
        ("mcore_to_hf.py", "--checkpoint", small[1]),
    ):
        result = script(name, flag, source, "--output", tmp_path / "out", limit=100_000)
        assert result.returncode == 2, result.stderr
        last = result.stderr.strip().splitlines()[-1]
        assert last.startswith("error: no space left while writing")
        assert "Traceback" not in result.stderr
        assert list(tmp_path.iterdir()) == []


# A worker that has written something and then waits for ever.
STUCK = """
import sys
import time
from checkpoint_tools import hf_to_mcore
from checkpoint_tools.common import run_script
from engine.checkpointing import store_writer
store_writer._Archives._finished = lambda *_: time.sleep(600)  # each worker, after its first tensor
sys.exit(run_script(hf_to_mcore.main, sys.argv[1:]))
"""


@pytest.mark.parametrize("victim", ["the script", "a worker"])
def test_a_conversion_that_is_killed_leaves_nothing(small, tmp_path, victim):
    out = tmp_path / "out"
    command = [sys.executable, "-c", STUCK, "--hf", small[0], "--output", out, "--num-workers", "2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(list(map(str, command)), env=environment, stderr=subprocess.PIPE, text=True) as process:
        while process.poll() is None and len(list(tmp_path.rglob("__?_0.distcp"))) < 2:
            time.sleep(0.01)
        listed = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
        workers = [int(pid) for pid in listed.split()]
        assert len(workers) == 2
        process.terminate() if victim == "the script" else os.kill(workers[1], signal.SIGKILL)
        errors = process.communicate(timeout=60)[1]
    assert process.returncode == (143 if victim == "the script" else 2), errors
    assert "Traceback" not in errors
    if victim == "a worker":
        assert errors.splitlines()[-1].startswith("error: a worker process was killed by SIGKILL")
    assert list(tmp_path.iterdir()) == []
    assert not [pid for pid in workers if Path(f"/proc/{pid}").exists()]


def test_scripts_work_from_the_command_line(small, tmp_path):
    source, _ = small
    result = script("hf_to_mcore.py", "--hf", source, "--output", tmp_path / "checkpoint")
    assert result.returncode == 0, result.stderr
    result = script("mcore_to_hf.py", "--checkpoint", tmp_path / "checkpoint", "--output", tmp_path / "back")
    assert result.returncode == 0, result.stderr
    assert tree(tmp_path / "back") == tree(source)

"""What a run sets for CUDA and NCCL: what its layout needs, never over what a user has set."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from engine import cuda_setup, mesh
from engine.check_model import megatron_config
from engine.config import OptimConfig, RunConfig
from engine.cuda_setup import check, choose, wanted
from engine.layout import Layout
from models.hf_config import describe
from tests.support.tiny import conversations, save_model
from tests.support.training import train

ROOT = Path(__file__).resolve().parents[2]
DUMPS = Path("RUN/collectives_rank_")


def chosen(layout: Layout | None = None, environment: dict | None = None, *, deterministic: bool = False) -> dict:
    layout = layout or Layout()
    return choose(wanted(layout, deterministic=deterministic, dumps=DUMPS), environment or {})


def test_every_run_records_its_collectives_and_lets_memory_grow():
    found = chosen()
    assert found["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"
    assert int(found["TORCH_FR_BUFFER_SIZE"]) > 0 and found["TORCH_NCCL_DUMP_ON_TIMEOUT"] == "1"
    assert found["TORCH_FR_DUMP_TEMP_FILE"] == str(DUMPS.absolute())  # torch appends the rank, wherever the process is


@pytest.mark.parametrize(
    ("layout", "queues"),
    [(Layout(), None), (Layout(ep=8), None), (Layout(pp=2), None), (Layout(tp=2, sp=True), "1"), (Layout(cp=2), "1")],
)
def test_one_queue_where_collectives_hide_behind_products(layout, queues):
    assert chosen(layout).get("CUDA_DEVICE_MAX_CONNECTIONS") == queues


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ("CUDA_DEVICE_MAX_CONNECTIONS", "CUDA_DEVICE_MAX_CONNECTIONS"),
        ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"),
        ("PYTORCH_ALLOC_CONF", "PYTORCH_ALLOC_CONF"),
        ("TORCH_NCCL_TRACE_BUFFER_SIZE", "TORCH_FR_BUFFER_SIZE"),
        ("TORCH_NCCL_DEBUG_INFO_TEMP_FILE", "TORCH_FR_DUMP_TEMP_FILE"),
    ],
)
def test_what_a_user_has_set_stays(given, name):
    whole, found = chosen(Layout(tp=2)), chosen(Layout(tp=2), {given: "anything"})
    assert found == {key: value for key, value in whole.items() if key != name} and name in whole


def test_deterministic_sets_what_repeats_sums():
    more = {name: value for name, value in chosen(deterministic=True).items() if name not in chosen()}
    assert more == {
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
        "NCCL_ALGO": "^NVLS,NVLSTree",
        "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0",
    }


@pytest.mark.parametrize(
    ("name", "wrong", "right"),
    [
        ("CUBLAS_WORKSPACE_CONFIG", ":1024:1", ":16:8"),
        ("NVTE_ALLOW_NONDETERMINISTIC_ALGO", "1", "0"),
        ("NCCL_ALGO", "NVLS,Ring", "Ring"),
        ("NCCL_ALGO", "^Tree", "^NVLS,NVLSTree"),
    ],
)
def test_what_cannot_repeat_sums_is_refused(name, wrong, right):
    with pytest.raises(ValueError, match=re.escape(f"--deterministic: {name} is {wrong}")):
        check({name: wrong}, deterministic=True)
    check({name: right}, deterministic=True)
    check({name: wrong}, deterministic=False)


def test_a_run_says_what_it_has_set_and_what_it_has_left(monkeypatch):
    for one in wanted(Layout(tp=2), deterministic=True, dumps=DUMPS):
        for name in (one.name, *one.aliases):
            monkeypatch.setenv(name, "")  # so that it is put back
            monkeypatch.delenv(name)
    monkeypatch.setattr(cuda_setup, "_set", {})
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "backend:native")
    cuda_setup.apply(Layout(tp=2), deterministic=False, dumps=DUMPS)
    assert os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] == "1" and "PYTORCH_ALLOC_CONF" not in os.environ
    said = cuda_setup.setup_line(Layout(tp=2), deterministic=False, dumps=DUMPS)
    ours, theirs = said.split("; left as given ")
    assert "CUDA_DEVICE_MAX_CONNECTIONS=1" in ours and theirs == "PYTORCH_CUDA_ALLOC_CONF=backend:native"


def test_the_script_sets_the_environment_before_torch_is_there(tmp_path):
    """And refuses, in one sentence, what cannot work."""
    probe = (
        "import json, os, sys\n"
        "from examples import pretrain_sft\n"
        "class Seen:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'torch':\n"
        "            print(json.dumps(dict(os.environ)), flush=True)\n"
        "            os._exit(0)\n"
        "sys.meta_path.insert(0, Seen())\n"
        "sys.exit(pretrain_sft.main(sys.argv[1:]))\n"
    )
    names = {name for one in wanted(Layout(tp=2), deterministic=True, dumps=DUMPS) for name in (one.name, *one.aliases)}
    clean = {name: value for name, value in os.environ.items() if name not in names} | {"PYTHONPATH": str(ROOT)}
    clean |= {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}
    command = [sys.executable, "-c", probe, "--tp", "2", "--deterministic", "--output", str(tmp_path / "run")]
    done = subprocess.run(command, env=clean, capture_output=True, text=True, timeout=120)
    seen = json.loads(done.stdout.splitlines()[-1])
    assert seen["CUDA_DEVICE_MAX_CONNECTIONS"] == "1" and seen["NCCL_ALGO"] == "^NVLS,NVLSTree"
    assert seen["TORCH_FR_DUMP_TEMP_FILE"] == str(tmp_path / "run" / "collectives_rank_")
    refused = subprocess.run(command, env=clean | {"NCCL_ALGO": "NVLS"}, capture_output=True, text=True, timeout=120)
    assert refused.returncode == 2 and "--deterministic: NCCL_ALGO is NVLS" in refused.stderr


def switches() -> tuple[bool, ...]:
    products, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    split = products.allow_bf16_reduced_precision_reduction, products.allow_fp16_reduced_precision_reduction
    return (*split, torch.are_deterministic_algorithms_enabled(), cudnn.deterministic, cudnn.benchmark)


def both_ways() -> list[tuple[bool, ...]]:
    """torch's switches as they are, in a run and in a deterministic one."""
    products, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    products.allow_bf16_reduced_precision_reduction = products.allow_fp16_reduced_precision_reduction = True
    cudnn.benchmark = True
    found = [switches()]
    try:
        for deterministic in (False, True):
            cuda_setup.switch(deterministic=deterministic)
            found.append(switches())
    finally:
        torch.use_deterministic_algorithms(False)
        cudnn.deterministic = cudnn.benchmark = False
    return found


def test_torchs_switches(pool):
    before, usual, deterministic = pool.run(both_ways, 1)[0]
    assert before == (True, True, False, False, True)
    assert usual == (False, False, False, False, True)
    assert deterministic == (False, False, True, True, False)


def train_deterministically(*arguments):
    cuda_setup.switch(deterministic=True)
    try:
        return train(*arguments)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("layout", [Layout(), Layout(ep=2)], ids=["dp1", "ep2"])
def test_every_operator_of_a_step_can_repeat_its_sums(pool, tmp_path, layout):
    """On the host; an operator that cannot raises an error."""
    folder, optim = save_model("gpt_oss", tmp_path / "model"), OptimConfig(lr=1e-3, schedule="constant")
    arguments = (layout.ep, folder, layout, conversations(16), 2, optim, {})
    usual, found = pool.run(train, *arguments)[0], pool.run(train_deterministically, *arguments)[0]
    assert found.losses == pytest.approx(usual.losses, rel=1e-6) and len(found.losses) == 2


@pytest.mark.parametrize("deterministic", [False, True])
def test_megatron_core_is_told(tmp_path, deterministic):
    description = describe(save_model("gpt_oss", tmp_path / "model"))
    config = RunConfig(deterministic=deterministic)
    assert megatron_config(config, description).deterministic_mode is deterministic


def test_ranks_on_gpus_meet_over_nccl_alone(monkeypatch):
    """With the device that is theirs, and a time limit; gloo would connect each with all."""
    made = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: made.append(device))
    monkeypatch.setattr(mesh.distributed, "is_initialized", lambda: False)
    monkeypatch.setattr(mesh.distributed, "init_process_group", lambda **options: made.append(options))
    for name, value in {"RANK": "9", "WORLD_SIZE": "16", "LOCAL_RANK": "1", "MASTER_ADDR": "here"}.items():
        monkeypatch.setenv(name, value)
    assert mesh.join_world(timeout_minutes=7) == (9, 16, torch.device("cuda", 1))
    device, options = made
    assert device == options["device_id"] == torch.device("cuda", 1)
    assert options["backend"] == "nccl" and options["timeout"].total_seconds() == 420

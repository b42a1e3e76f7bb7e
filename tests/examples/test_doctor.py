"""What a node has and lacks, in lines."""

from __future__ import annotations

import importlib

import torch

from engine.guards import agreement
from examples import doctor
from tests.support.tiny import save_model


def test_a_node_that_lacks_nothing(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(agreement, "complaints", lambda run, ranks: [])
    assert doctor.main(["--output", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert f"torch {torch.__version__}" in printed and "megatron-core 0.16.1" in printed
    assert printed.endswith("this node lacks nothing\n")
    if not torch.cuda.is_available():
        assert "--backend auto chooses native in bf16, because: no GPU is visible" in printed


def test_a_node_of_many_says_only_what_it_lacks(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(agreement, "complaints", lambda run, ranks: [])
    monkeypatch.setattr("platform.node", lambda: "node17")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 7)
    assert doctor.main(["--output", str(tmp_path), "--brief", "--gpus", "7"]) == 0
    assert capsys.readouterr().out == "node17 lacks nothing\n"
    assert doctor.main(["--output", str(tmp_path), "--brief", "--gpus", "8"]) == 1
    said = "node17 lacking: torch sees 7 GPUs and 8 are wanted: leave this node out\nnode17 1 to mend\n"
    assert capsys.readouterr().out == said


def test_what_lacks_is_said_with_its_mend(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(agreement, "complaints", lambda run, ranks: [f"{run} is full for {ranks}"])
    assert doctor.main(["--output", str(tmp_path), "--ranks", "64"]) == 1
    assert f"lacking: {tmp_path} is full for 64\n1 to mend\n" in capsys.readouterr().out
    monkeypatch.setattr(doctor, "installed", lambda library: None if library == "megatron-core" else "1")
    assert doctor.main([]) == 1
    assert (
        "lacking: megatron-core is not installed and nothing trains without it: pip install" in capsys.readouterr().out
    )


def test_a_model_that_cannot_run_here(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    save_model("qwen3_moe", tmp_path / "model", layers=1)
    assert doctor.main(["--model", str(tmp_path / "model"), "--precision", "fp8"]) == 1
    assert "lacking: --precision fp8 needs --backend te on a GPU" in capsys.readouterr().out
    assert doctor.main(["--model", str(tmp_path / "nowhere")]) == 1
    assert "nowhere" in capsys.readouterr().out


def test_a_gpu_without_a_compiler(capsys, monkeypatch, tmp_path):
    """The first step compiles its kernels, long after weights are loaded."""
    monkeypatch.setattr(agreement, "complaints", lambda run, ranks: [])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr("torch.cuda.nccl.version", lambda: (2, 29))
    for fault, status in (("a compiler", 1), (None, 0)):
        monkeypatch.setattr("models.layers.fused.compiler_fault", lambda fault=fault: fault)
        assert doctor.main(["--output", str(tmp_path)]) == status
        assert ("lacking: a compiler\n1 to mend\n" in capsys.readouterr().out) is (status == 1)


def test_a_library_that_does_not_import(capsys, monkeypatch):
    def broken(model, precision):
        raise ImportError("libcudart.so.12: cannot open shared object file")

    monkeypatch.setattr(doctor, "device_lines", broken)
    assert doctor.main([]) == 1
    assert "lacking: a library is installed and does not import: libcudart.so.12" in capsys.readouterr().out


def test_a_library_that_is_not_there(capsys, monkeypatch):
    """Also one that is not on the list; a part of a library that is there makes that one broken."""
    for name, said in (
        ("nosuchlibrary", "nosuchlibrary is not installed and nothing trains without it: pip install -e .\n"),
        ("numpy.nosuchpart", "a library is installed and does not import: No module named 'numpy.nosuchpart'\n"),
    ):
        monkeypatch.setattr(doctor, "device_lines", lambda model, precision, name=name: importlib.import_module(name))
        assert doctor.main([]) == 1
        assert f"lacking: {said}" in capsys.readouterr().out
    for library in ("numpy", "pyyaml", "rich", "tyro", "xxhash"):
        monkeypatch.setattr(doctor, "installed", lambda name, library=library: None if name == library else "1")
        assert doctor.main([]) == 1
        assert f"lacking: {library} is not installed and nothing trains without it" in capsys.readouterr().out

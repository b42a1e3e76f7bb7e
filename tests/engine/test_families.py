"""Every family resumes under another layout as if nothing had happened, and its steps average to their fp64 mean."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from checkpoint_tools import average_steps, mcore_to_hf
from data.index import write_index
from engine.run_folder import RunFolder
from models.conversion.hf_reader import SINGLE
from tests.engine.checkpointing.test_resume import interrupt, metrics, run
from tests.support.marks import slow
from tests.support.tiny import EXPERTS, MODELS, VOCABULARY, conversations, save_model

SOON = ("qwen2_tied", "olmo3", "gpt_oss")  # the rest is slow


@pytest.mark.parametrize("name", [name if name in SOON else slow(name) for name in MODELS])
def test_a_family_resumes_and_averages(pool, tmp_path, name):
    source = save_model(name, tmp_path / "model")
    write_index(tmp_path / "data", conversations(12).documents, vocab_size=VOCABULARY)
    shape = "--seq-len 96 --global-batch-size 4 --steps 4 --checkpoint.every 2 --precision fp32 --optim.lr 1e-3"
    flags = ["--model", str(source), "--data", str(tmp_path / "data"), "--pad-documents-to", "4", *shape.split()]
    first, second = ("--ep 2", "--pp 2") if name in EXPERTS else ("--tp 2", "--cp 2")
    pool.run(run, 2, [*flags, "--output", str(tmp_path / "whole"), *first.split()])
    interrupt(tmp_path / "whole", tmp_path / "cut", 2)
    pool.run(run, 2, [*flags, "--output", str(tmp_path / "cut"), *second.split()])
    found, wanted = metrics(tmp_path / "cut"), metrics(tmp_path / "whole")
    for key, tolerance in (("loss", 1e-5), ("grad_norm", 1e-4)):
        np.testing.assert_allclose([f[key] for f in found], [w[key] for w in wanted], rtol=tolerance)
    exported = []
    for step in (2, 4):
        mcore_to_hf.main(checkpoint=RunFolder(tmp_path / "whole").checkpoint(step), output=tmp_path / f"step{step}")
        exported.append(load_file(tmp_path / f"step{step}" / SINGLE))
    average_steps.main(run=tmp_path / "whole", steps="2,4", output=tmp_path / "mean", format="hf")
    mean = load_file(tmp_path / "mean" / SINGLE)
    assert mean.keys() == exported[0].keys()
    for key, tensor in mean.items():
        assert torch.equal(tensor, ((exported[0][key].double() + exported[1][key].double()) / 2).float()), key
    assert any(not torch.equal(exported[0][key], exported[1][key]) for key in mean)

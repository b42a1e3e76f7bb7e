"""`--push-to-hub` of exports and averages: its mistakes come before the work, the upload after it."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from checkpoint_tools import average_steps, hf_to_mcore, mcore_to_hf, publish
from checkpoint_tools.common import run_script
from engine.run_folder import RunFolder
from tests.checkpoint_tools.test_publish import REPO, content
from tests.support.hub import TOKEN
from tests.support.tiny import save_model


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run with two checkpoints of one small model."""
    folder = tmp_path_factory.mktemp("run")
    save_model("llama", folder / "hf", layers=1)
    for step in (1, 2):
        hf_to_mcore.main(hf=folder / "hf", output=RunFolder(folder).checkpoint(step), num_workers=1)
    return folder


def export(run: Path, output: Path, **options) -> None:
    mcore_to_hf.main(checkpoint=RunFolder(run).checkpoint(1), output=output, num_workers=1, **options)


def average(run: Path, output: Path, format: str = "hf", **options) -> None:
    average_steps.main(run, "1,2", output, format, num_workers=1, **options)


@pytest.mark.parametrize("make", [export, average])
def test_what_was_made_is_published(hub, run, tmp_path, make):
    make(run, tmp_path / "out", push_to_hub=REPO, private=True)
    there = hub.files(REPO)
    assert there.pop("README.md").startswith(b"---\n") and there == content(tmp_path / "out")
    assert hub.repos[REPO].private


@pytest.mark.parametrize("make", [export, average])
@pytest.mark.parametrize("private", [False, True])
def test_what_was_made_is_not_made_again_after_an_interruption(hub, run, tmp_path, make, private):
    """The sentence names the command that goes on, into a repository that is as private as it was to be."""
    make(run, tmp_path / "same")
    (weights,) = (tmp_path / "same").glob("*.safetensors")
    oid = hashlib.sha256(weights.read_bytes()).hexdigest()
    hub.cuts[oid] = 1000
    output = tmp_path / "out"
    with pytest.raises(ValueError, match="the connection to the hub broke") as caught:
        make(run, output, push_to_hub=REPO, private=private)
    command = f"lathe publish {output} --repo {REPO}{' --private' if private else ''}"
    sentence = str(caught.value)
    assert sentence.endswith(f"; {output} is whole: `{command}` goes on, and sends what the hub lacks")
    assert "same command" not in sentence
    hub.cuts.clear()
    before, kept = hub.received.copy(), set(hub.repos[REPO].objects)
    assert run_script(publish.main, command.split()[2:], section="publish") == 0
    again = hub.received - before
    assert again[oid] == weights.stat().st_size and not kept & again.keys()
    assert hub.files(REPO).items() >= content(output).items() and hub.repos[REPO].private == private


def test_a_token_that_turns_out_too_weak_costs_no_second_conversion(hub, run, tmp_path):
    hub.refusals["/commit/"] = (403, "no")
    with pytest.raises(
        ValueError, match=r"\(403\): give one .*; it says: no; .*out is whole: `lathe publish .*` goes on"
    ):
        export(run, tmp_path / "out", push_to_hub=REPO)


@pytest.mark.parametrize("make", [export, average])
def test_what_cannot_be_published_is_not_made(hub, run, tmp_path, monkeypatch, make):
    for options, sentence in (
        ({"push_to_hub": "model"}, "--push-to-hub model lacks its owner"),
        ({"push_to_hub": REPO}, "could not be checked: the hub does not know the access token (401)"),
        ({"push_to_hub": "typo-lab/model"}, "--push-to-hub typo-lab/model: the owner is typo-lab, and the token is of"),
        ({"private": True}, "--private is of the repository that --push-to-hub names: give that, or leave it out"),
    ):
        monkeypatch.setenv("HF_TOKEN", TOKEN if "typo" in sentence else "hf_nobodys")
        with pytest.raises(ValueError) as caught:
            make(run, tmp_path / "out", **options)
        assert sentence in str(caught.value)
    assert not (tmp_path / "out").exists() and not hub.repos


def test_a_checkpoint_is_not_published(hub, run, tmp_path):
    with pytest.raises(ValueError, match="--push-to-hub ours/model takes a Hugging Face directory: add --format hf"):
        average(run, tmp_path / "out", format="mcore", push_to_hub=REPO)
    assert not hub.asked

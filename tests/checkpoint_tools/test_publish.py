"""Publishing, against a stand-in of the hub: what arrives, what an interruption costs, and every refusal."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from checkpoint_tools import publish
from checkpoint_tools.common import run_script
from checkpoint_tools.hub.card import is_untouched
from engine.checkpointing.export_sums import write_small_sums, write_weight_sums
from models.conversion.hf_reader import INDEX
from tests.support.hub import TOKEN, Repo, StandInHub

ROOT = Path(__file__).parents[2]
REPO = "ours/model"
SIZES = (30_000, 40_000, 50_000, 60_000)  # numbers of each file of weights


def write_model(folder: Path, seed: int = 0, sizes: tuple[int, ...] = SIZES) -> Path:
    """A model directory as an export writes it, with a file of weights for each of the sizes."""
    folder.mkdir()
    numbers = np.random.default_rng(seed)
    files = [f"model-{place + 1:05d}-of-{len(sizes):05d}.safetensors" for place in range(len(sizes))]
    for place, (file, size) in enumerate(zip(files, sizes, strict=True)):
        save_file({f"layer_{place}": numbers.standard_normal(size, np.float32)}, folder / file)
    weight_map = {f"layer_{place}": file for place, file in enumerate(files)}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text('{"model_type": "made_up"}')
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tools.jinja").write_text("{{ messages }}")
    write_weight_sums(folder, (0, 1))
    write_small_sums(folder)
    return folder


def content(folder: Path) -> dict[str, bytes]:
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.fixture
def model(tmp_path):
    return write_model(tmp_path / "hf")


def refusal(*arguments, **options) -> str:
    with pytest.raises(ValueError) as caught:
        publish.main(*arguments, **options)
    return str(caught.value)


@pytest.mark.parametrize(("part_bytes", "private", "branch"), [(1 << 40, False, "main"), (70_001, True, "second")])
def test_published_bytes_are_those_of_the_folder(hub, model, part_bytes, private, branch, capsys):
    """As single files and in parts, each byte sent once, in one commit."""
    hub.part_bytes = part_bytes
    publish.main(model, REPO, private=private, branch=branch)
    there = hub.files(REPO, branch)
    card = there.pop("README.md").decode()
    assert there == content(model)
    assert is_untouched(card) and "# model\n" in card
    assert hub.repos[REPO].private == private and len(hub.repos[REPO].commits) == 1
    large = [name for name in there if name.endswith((".safetensors", ".sums"))]
    assert hub.received.total() == sum(len(there[name]) for name in large)
    address = f"{hub.url}/{REPO}" + ("" if branch == "main" else f"/tree/{branch}")
    assert capsys.readouterr().out.splitlines()[-1] == f"published: {address}"
    publish.main(model, REPO, private=private, branch=branch)
    assert len(hub.repos[REPO].commits) == 1, "the same again is no new commit"
    assert hub.received.total() == sum(len(there[name]) for name in large)


def test_an_interrupted_upload_sends_only_what_is_missing(hub, model):
    """The third of four files breaks off in its middle, each time that it is tried."""
    weights = {sha256(data): len(data) for name, data in content(model).items() if name.endswith(".safetensors")}
    broken = sha256((model / "model-00003-of-00004.safetensors").read_bytes())
    hub.cuts[broken] = 100_000
    sentence = refusal(model, REPO)
    assert sentence.startswith(f"{REPO} could not be published: the connection to the hub broke (")
    assert sentence.endswith("); the same command goes on, and sends what the hub lacks")
    before, kept = hub.received.copy(), set(hub.repos[REPO].objects)
    assert hub.files(REPO) == {}, "a model that is there in part is not shown"
    assert broken not in kept and len(kept & weights.keys()) >= 2 and before[broken] >= 100_000
    hub.cuts.clear()
    publish.main(model, REPO)
    again = hub.received - before
    assert not kept & again.keys() and again[broken] == weights[broken]
    assert {oid: again[oid] for oid in weights} == {o: 0 if o in kept else size for o, size in weights.items()}
    assert hub.files(REPO).items() >= content(model).items()


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@pytest.mark.parametrize(
    "place", ["GET /api/whoami", "POST /api/repos/create", "/preupload/", "/objects/batch", "PUT /store", "/commit/"]
)
@pytest.mark.parametrize(
    ("status", "words"),
    [
        (401, "the hub does not know the access token (401): make one with write access and give it as HF_TOKEN"),
        (403, "the access token may not do this (403): give one with write access to ours as HF_TOKEN"),
        (429, "the hub takes no more requests for now (429): wait some minutes; it says: "),
        (500, "the hub failed (500); the same command goes on, and sends what the hub lacks"),
    ],
)
def test_what_the_hub_refuses_is_one_sentence_without_the_token(hub, model, place, status, words, capfd, caplog):
    """A server that repeats the token, in its answer and in a warning that the library logs."""
    hub.refusals[place] = (status, f"Bearer {TOKEN} was\nrefused")
    hub.warning = f"{place}{status}; this is your token: {TOKEN}"
    handler = logging.StreamHandler(sys.stderr)
    logging.getLogger("huggingface_hub").addHandler(handler)
    try:
        sentence = refusal(model, REPO)
    finally:
        logging.getLogger("huggingface_hub").removeHandler(handler)
    assert words in sentence and "\n" not in sentence
    assert ("it says: Bearer [token] was refused" in sentence) == (status < 500)
    assert ("the same command goes on" in sentence) == (status in (429, 500)), "which it does not for a wrong token"
    shown = "".join(capfd.readouterr())
    assert "this is your token: [token]" in shown
    assert TOKEN not in sentence + shown
    assert not hub.repos or hub.files(REPO) == {}


@pytest.mark.parametrize(
    ("repo", "sentence"),
    [
        ("model", "--repo model lacks its owner: give OWNER/NAME"),
        ("a/b/c", "--repo a/b/c is no name of a repository"),
        ("ours/a..b", "--repo ours/a..b is no name of a repository"),
        ("theirs/model", "--repo theirs/model: the owner is theirs, and the token is of ours, our-lab"),
        ("theirs/free", "--repo theirs/free: the owner is theirs, and the token is of ours, our-lab"),
        (TOKEN, "--repo holds what looks like an access token"),
    ],
)
def test_a_repository_that_cannot_be_ours_is_refused(hub, model, repo, sentence):
    hub.repos["theirs/model"] = Repo(private=False)
    found = refusal(model, repo)
    assert sentence in found and TOKEN not in found
    assert not any("commit" in request or "batch" in request for request in hub.asked)


@pytest.mark.parametrize("hides", [{"role": "fineGrained", "orgs": []}, {"orgs": None}])
def test_who_owns_a_name_is_left_to_the_hub_where_a_token_does_not_say(hub, model, hides):
    """A token for chosen places: organisations that it may write to need not be listed."""
    for name, value in hides.items():
        setattr(hub, name, value)
    sentence = refusal(model, "theirs/free")
    assert "the access token may not do this (403): give one with write access to theirs as HF_TOKEN" in sentence
    publish.main(model, "our-lab/model")
    assert hub.files("our-lab/model").items() >= content(model).items()


def test_what_is_wrong_here_is_told_before_anything_is_sent(hub, model, monkeypatch):
    hub.repos[REPO] = Repo(private=False)
    assert "--private: ours/model exists and everybody can read it" in refusal(model, REPO, private=True)
    hub.role = "read"
    assert "the access token may only read; give one with write access as HF_TOKEN" in refusal(model, REPO)
    hub.role = "write"
    monkeypatch.setenv("HF_TOKEN", "hf_somebodyelses" + "0" * 20)
    assert "the hub does not know the access token (401)" in refusal(model, REPO)
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", "/nowhere/token")
    asked = len(hub.asked)
    assert "needs an access token of the hub with write access: set HF_TOKEN, or" in refusal(model, REPO)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "could not be checked: HF_HUB_OFFLINE is set; take it out" in refusal(model, REPO)
    assert len(hub.asked) == asked


def lose(path: Path) -> None:
    (path / "model-00002-of-00004.safetensors").unlink()


def add(path: Path) -> None:
    save_file({"more": np.ones(3)}, path / "model-00005-of-00005.safetensors")


def damage(path: Path) -> None:
    file = path / "model-00003-of-00004.safetensors"
    data = bytearray(file.read_bytes())
    data[-100] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize(
    ("harm", "sentence"),
    [
        (lambda path: (path / "config.json").unlink(), "is no model directory: it has no config.json; export"),
        (lose, "lacks model-00002-of-00004.safetensors, which its model.safetensors.index.json lists"),
        (add, "holds weights that its index does not list (model-00005-of-00005.safetensors)"),
        (damage, "model-00003-of-00004.safetensors is damaged"),
        (lambda path: (path / "notes.txt").write_text(f"key={TOKEN}"), "notes.txt holds your access token: remove"),
    ],
)
def test_a_folder_that_is_no_whole_model_is_refused(hub, model, harm, sentence):
    harm(model)
    found = refusal(model, REPO)
    assert sentence in found and TOKEN not in found
    assert not hub.repos


def test_a_readme_of_somebodys_own_stays(hub, model, capsys):
    """That of the folder is sent as it is; one that was edited on the hub is kept until the folder has one."""
    publish.main(model, REPO, license="mit")
    publish.main(model, REPO, license="apache-2.0")
    files = hub.repos[REPO].branches["main"]
    assert b"license: apache-2.0" in files["README.md"], "a card that nobody has touched is written anew"
    files["README.md"] = edited = files["README.md"].replace(b"# model", b"# My model")
    publish.main(model, REPO, license="mit")
    assert files["README.md"] == edited and hub.files(REPO)["README.md"] == edited
    assert f"README.md of {REPO} was edited there and is kept" in capsys.readouterr().out
    (model / "README.md").write_text("---\nlicense: mit\n---\nMine.\n")
    publish.main(model, REPO)
    assert hub.files(REPO)["README.md"] == b"---\nlicense: mit\n---\nMine.\n"
    assert "README.md is sent as it is" in capsys.readouterr().out


def test_another_model_takes_the_place_of_the_first(hub, model, tmp_path, capsys):
    publish.main(model, REPO)
    theirs = {"plot.png": b"plot", "adapter/model.safetensors": b"another model"}
    hub.repos[REPO].branches["main"] |= theirs
    smaller = write_model(tmp_path / "smaller", seed=1, sizes=(1000, 2000))
    (smaller / ".cache").mkdir()
    (smaller / ".cache" / "x").write_text("local")
    publish.main(smaller, REPO)
    there = hub.files(REPO)
    assert {name: there.pop(name) for name in theirs} == theirs and there.pop("README.md")
    assert there == {name: data for name, data in content(smaller).items() if name != ".cache/x"}
    printed = capsys.readouterr().out
    assert f"removed from {REPO}, as they are no part of this model: model-00001-of-00004.safetensors" in printed
    assert "not sent, as their names begin with a dot: .cache/x (1 in all)" in printed


def test_a_dry_run_shows_all_and_asks_nothing(hub, model, capsys):
    publish.main(model, REPO, dry_run=True)
    printed = capsys.readouterr().out
    assert "\nlicense: unknown\n" in printed and "# model\n" in printed
    for name, data in content(model).items():
        assert f"{len(data):>15,}  {name}\n" in printed
    assert printed.endswith(f"would go to {REPO}; nothing was sent\n") and hub.asked == []


def test_a_recipe_says_what_is_published(hub, tmp_path, capsys):
    """Its average by default; flags win; a mistake is one sentence and status 2."""
    (tmp_path / "run").mkdir()
    model = write_model(tmp_path / "run" / "average")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"output: {tmp_path}/run\naverage: {{steps: [1, 2]}}\npublish: {{repo: {REPO}}}\n")
    assert run_script(publish.main, [str(recipe), "--license", "mit"], section="publish") == 0
    assert hub.files(REPO).items() >= content(model).items() and b"license: mit" in hub.files(REPO)["README.md"]
    assert run_script(publish.main, [str(model), "--repo", "ours/other"], section="publish") == 0
    assert hub.files("ours/other").items() >= content(model).items()
    recipe.write_text(f"output: {tmp_path}/run\naverage: {{steps: [1, 2]}}\npublish: {{repos: {REPO}}}\n")
    assert run_script(publish.main, [str(recipe)], section="publish") == 2
    assert "unknown recipe key publish.repos; the nearest is publish.repo" in capsys.readouterr().err


def test_the_command_publishes_and_keeps_the_token_to_itself(model, tmp_path):
    with StandInHub() as hub:
        environment = {**os.environ, **hub.environment, "HF_HOME": str(tmp_path / "home"), "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-m", "examples.lathe", "publish", str(model), "--repo", REPO]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 0 and done.stdout.endswith(f"published: {hub.url}/{REPO}\n"), done.stderr
        assert hub.files(REPO).items() >= content(model).items()
        hub.refusals["whoami"] = (403, f"{TOKEN} is known to us")
        failed = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert failed.returncode == 2 and failed.stderr.splitlines()[-1].startswith(
        "error: ours/model could not be checked"
    )
    assert TOKEN not in done.stdout + done.stderr + failed.stdout + failed.stderr
    written = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert written and not [file for file in written if TOKEN.encode() in file.read_bytes()]

"""Preparing that is stopped continues, and the script says in one sentence what is wrong."""

import json
import re
import shutil
import signal
import subprocess
import time

import pytest

import data.preparation.prepare
import data.preparation.rows
import data.preparation.workers
from data.index import DocumentIndex
from tests.support.chatting import small_tokenizer
from tests.support.preparing import ENVIRONMENT, SCRIPT, contents, jsonl, rows, run


def test_a_failed_run_continues_with_what_is_missing(model, tmp_path, small_chunks, monkeypatch):
    source = jsonl(tmp_path / "a.jsonl", rows(100))
    run(model, tmp_path / "whole", source)
    write = data.preparation.workers.write_part
    parts = tmp_path / "data.parts"

    def full_disk(job, number, *rest):
        if number >= 4:
            raise OSError(28, "No space left on device", str(job.part(number)))
        write(job, number, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(data.preparation.workers, "write_part", full_disk)
        with pytest.raises(OSError, match=rf"^No space left .* {parts}/0.*: make room .* it will continue$"):
            run(model, tmp_path / "data", source)
    assert sorted(file.name for file in parts.glob("*.npz")) == [f"{number:06d}.npz" for number in range(4)]
    with pytest.raises(ValueError, match="half-written"):
        DocumentIndex(tmp_path / "data")
    (parts / "000001.npz").unlink()
    _, printed = run(model, tmp_path / "data", source)
    assert re.search(r"continuing: \d+ of \d+ chunks", printed)
    assert contents(tmp_path / "data") == contents(tmp_path / "whole")
    assert not parts.exists()


def test_progress_is_said_in_lines_where_there_is_no_terminal(model, tmp_path, small_chunks, monkeypatch):
    monkeypatch.setattr(data.preparation.workers, "_LINE_SECONDS", 0.001)
    _, printed = run(model, tmp_path / "data", jsonl(tmp_path / "a.jsonl", rows(200)))
    said = re.findall(r"preparing: (\d+) of (\d+) chunks, ([\d,]+) rows, [\d,]+ rows/s, about \d+ s left", printed)
    assert said and all(0 < int(rows) <= 200 for _, _, rows in said)
    assert [int(done) for done, _, _ in said] == sorted(int(done) for done, _, _ in said)


def test_a_killed_run_continues(model, tmp_path):
    source = jsonl(tmp_path / "a.jsonl", rows(6_000))
    command = [*SCRIPT, "--model", str(model), "--sources", str(source), "--output", str(tmp_path / "data")]
    process = subprocess.Popen([*command, "--num-workers", "1"], stdout=subprocess.DEVNULL, env=ENVIRONMENT)
    parts = tmp_path / "data.parts"
    while len(list(parts.glob("*.npz"))) < 2 and process.poll() is None:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert parts.exists() and not (tmp_path / "data").exists()
    meta, printed = run(model, tmp_path / "data", source)
    assert meta["documents"] == 6_000
    assert "continuing: " in printed
    run(model, tmp_path / "whole", source, num_workers=1)
    assert contents(tmp_path / "data") == contents(tmp_path / "whole")


def test_other_options_start_anew_and_an_output_is_not_replaced(model, tmp_path):
    source = jsonl(tmp_path / "a.jsonl", rows(20))
    parts = tmp_path / "data.parts"
    parts.mkdir()
    (parts / "plan.json").write_text('{"digest": "other", "date": "2020-01-01"}')
    (parts / "000000.npz").write_bytes(b"not a part")
    _, printed = run(model, tmp_path / "data", source)
    assert "starting anew" in printed
    first = contents(tmp_path / "data")
    _, printed = run(model, tmp_path / "data", source)
    assert "is there already" in printed
    with pytest.raises(ValueError, match="choose another, or replace it with --overwrite"):
        run(model, tmp_path / "data", source, limit=3)
    assert contents(tmp_path / "data") == first
    run(model, tmp_path / "data", source, limit=3, overwrite=True)
    assert len(DocumentIndex(tmp_path / "data")) == 3


def test_another_end_token_under_the_same_path_is_noticed(tmp_path):
    source, model = jsonl(tmp_path / "a.jsonl", rows(3)), tmp_path / "model"
    tokenizer = small_tokenizer().__class__(tokenizer_object=small_tokenizer().backend_tokenizer, eos_token="</s>")
    tokenizer.save_pretrained(model)
    run(model, tmp_path / "data", source, chat_template="tulu")
    tokenizer.eos_token = "<|end|>"
    tokenizer.save_pretrained(model)
    with pytest.raises(ValueError, match="data exists: choose another, or replace it with --overwrite"):
        run(model, tmp_path / "data", source, chat_template="tulu")


@pytest.mark.parametrize("kind", ["run", "sources", "file in data", "data file", "link", "parts", "partial"])
def test_nothing_is_removed_that_preparing_did_not_make(model, tmp_path, kind):
    rows_of = jsonl(tmp_path / "a.jsonl", rows(5))
    output = tmp_path / "out"
    if kind == "run":
        (output / "checkpoints" / "step_000001").mkdir(parents=True)
        (output / "config.yaml").write_text("seed: 1\n")
    elif kind == "sources":
        output.mkdir()
        jsonl(output / "rows.jsonl", rows(3))
    elif kind == "data file":
        output.write_text("notes")
    elif kind in ("parts", "partial"):
        (tmp_path / f"out.{kind}").mkdir()
        (tmp_path / f"out.{kind}" / "notes.txt").write_text("mine")
    else:
        run(model, tmp_path / "real", rows_of)
        if kind == "link":
            output.symlink_to(tmp_path / "real")
        else:
            (tmp_path / "real").rename(output)
            (output / "notes.txt").write_text("mine")
    before = contents(tmp_path)
    with pytest.raises(ValueError, match="was not made by prepare_data"):
        run(model, output, rows_of, overwrite=True)
    assert contents(tmp_path) == before and output.is_symlink() == (kind == "link")


@pytest.mark.parametrize("inside", ["tokenizer/notes.txt", "valid/checkpoints/step_000001", "meta.json", "spans.npy"])
def test_the_whole_directory_is_looked_at_before_it_is_replaced(model, tmp_path, inside):
    source = jsonl(tmp_path / "a.jsonl", rows(20))
    output = tmp_path / "valid"  # a name that a data directory may hold
    run(model, output, source, hold_out=2)
    if inside in ("meta.json", "spans.npy"):
        shutil.rmtree(output)
        output.mkdir()
        (output / inside).write_text("{}")
    else:
        (output / inside).parent.mkdir(exist_ok=True)
        (output / inside).write_text("mine")
    before = contents(tmp_path)
    with pytest.raises(ValueError, match="was not made by prepare_data"):
        run(model, output, source, limit=9, overwrite=True)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("state", ["parts without a plan", "half a plan", "half of a partial", "half removed"])
def test_a_kill_at_any_moment_leaves_what_the_next_start_takes(model, tmp_path, state):
    source = jsonl(tmp_path / "a.jsonl", rows(20))
    output = tmp_path / "data"
    run(model, output, source, hold_out=2)
    if state == "parts without a plan":  # killed while the parts were removed, the data complete
        (tmp_path / "data.parts").mkdir()
        (tmp_path / "data.parts" / "000003.npz").write_bytes(b"")
        assert "is there already" in run(model, output, source, hold_out=2)[1]
    elif state == "half a plan":
        (tmp_path / "data.parts").mkdir()
        (tmp_path / "data.parts" / "plan.partial").write_text("{")
    elif state == "half of a partial":
        shutil.copytree(output, tmp_path / "data.partial")
        (tmp_path / "data.partial" / "tokens.bin").unlink()
    else:  # --overwrite had moved the new directory to its place already
        shutil.copytree(output, tmp_path / "data.replaced")
        (tmp_path / "data.replaced" / "meta.json").unlink()
    assert run(model, output, source, limit=5, overwrite=True)[0]["documents"] == 5
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "data"]


def test_what_came_to_stand_at_the_output_meanwhile_stays(model, tmp_path, monkeypatch):
    source = jsonl(tmp_path / "a.jsonl", rows(5))
    made = data.preparation.prepare.make_parts

    def slow(*arguments):
        made(*arguments)
        (tmp_path / "data" / "checkpoints").mkdir(parents=True)

    monkeypatch.setattr(data.preparation.prepare, "make_parts", slow)
    for overwrite, message in ((False, "came to be while"), (True, "was not made by prepare_data")):
        with pytest.raises(ValueError, match=message):
            run(model, tmp_path / "data", source, overwrite=overwrite)
        assert (tmp_path / "data" / "checkpoints").is_dir()
        shutil.rmtree(tmp_path / "data")


@pytest.mark.parametrize("overwrite", [False, True])
def test_an_output_that_holds_or_is_a_source_or_a_model_is_refused(model, tmp_path, overwrite):
    (tmp_path / "folder").mkdir()
    source = jsonl(tmp_path / "folder" / "a.jsonl", rows(5))
    before = contents(tmp_path) | contents(model)
    outputs = (tmp_path / "folder", tmp_path, source, model, model.parent)
    for output in outputs:
        with pytest.raises(ValueError, match="which the data is made from"):
            run(model, output, source, overwrite=overwrite)
    assert contents(tmp_path) | contents(model) == before
    (tmp_path / "link").symlink_to(tmp_path / "folder")
    with pytest.raises(ValueError, match="which the data is made from"):
        run(model, tmp_path / "folder", tmp_path / "link" / "a.jsonl", overwrite=overwrite)


def test_a_template_that_asks_for_the_date_gets_the_day_the_plan_was_made(model, tmp_path, small_chunks, monkeypatch):
    template = tmp_path / "dated.jinja"
    template.write_text("{{ strftime_now('%Y-%m-%d') }}" + small_tokenizer().chat_template)
    source = jsonl(tmp_path / "a.jsonl", rows(30))
    with monkeypatch.context() as patch:
        patch.setattr(data.preparation.prepare, "make_parts", lambda *_: (_ for _ in ()).throw(OSError("killed")))
        with pytest.raises(OSError):
            run(model, tmp_path / "data", source, chat_template=template)
    plan = tmp_path / "data.parts" / "plan.json"
    plan.write_text(json.dumps({**json.loads(plan.read_text()), "date": "2020-02-03T04:05:06"}))
    meta, _ = run(model, tmp_path / "data", source, chat_template=template)
    assert small_tokenizer().decode(DocumentIndex(tmp_path / "data").tokens(29)).startswith("2020-02-03<|im_start|>")
    assert meta["date"] == "2020-02-03T04:05:06"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--sources", "missing.jsonl"], "error: --sources missing.jsonl: there is no such file"),
        (["--sources", "{a}", "--num-workrs", "2"], "--num-workers"),
        (
            ["--sources", "{a}", "--prompt", "missing.txt"],
            "error: --prompt missing.txt: there is no such file",
        ),
        (["--sources", "{a}", "--hold-out-fraction", "2"], "--hold-out-fraction must be in"),
    ],
)
def test_script_says_what_is_wrong_in_one_sentence(model, tmp_path, options, message):
    source = jsonl(tmp_path / "a.jsonl", rows(3))
    command = [*SCRIPT, "--model", str(model), "--output", str(tmp_path / "data")]
    command += [option.format(a=source) for option in options]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 2
    assert message in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "data").exists()

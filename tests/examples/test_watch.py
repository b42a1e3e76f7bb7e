"""`evaluate --watch RUN`: exports are graded as they appear, whatever becomes of them, and the best step is named."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from safetensors.torch import load_file, save_file

from engine.run_folder import RunFolder
from examples.evaluate import main, read_options
from examples.evaluation import apart, watch
from examples.evaluation.options import EvaluationError
from examples.evaluation.run import RESULTS, Asked
from examples.evaluation.summary import summarise, summary_text
from tests.engine.reporting.test_report import write_metrics
from tests.support.evaluating import answering_model, write_problems

ROOT = Path(__file__).parents[2]
SCRIPT = "import sys; from examples.evaluation import watch; watch.POLL = 0.2; from examples.evaluate import main; "
SCRIPT += "sys.exit(main(sys.argv[1:]))"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A model, and problems of the set `heldout`."""
    folder = tmp_path_factory.mktemp("inputs")
    answering_model(folder / "model")
    write_problems(folder / "heldout.jsonl", 3)
    return folder


def export(inputs: Path, run: RunFolder, step: int, *, trained: int = 0) -> Path:
    """An export as a run leaves it: written beside its place and renamed; each step has weights of its own."""
    target = run.export(step)
    partial = target.with_name(target.name + ".tmp")
    shutil.copytree(inputs / "model", partial)
    weights = load_file(partial / "model.safetensors")
    changed = {name: tensor * (1 + (trained or step) / 1000) for name, tensor in weights.items()}
    save_file(changed, partial / "model.safetensors", {"format": "pt"})
    os.rename(partial, target)
    return target


def stand(folder: RunFolder, state: str, **more) -> None:
    folder.path.mkdir(parents=True, exist_ok=True)
    folder.status.write_text(json.dumps({"state": state, "step": 1, "time": "now", **more}))


def flags(inputs: Path, run: RunFolder, *extra: str) -> list[str]:
    asked = ["--data", inputs / "heldout.jsonl", "--max-new-tokens", 8, "--batch-size", 4]
    return [*map(str, ["--watch", run.path, *asked]), *extra]


@pytest.fixture
def answers(monkeypatch):
    """In the place of models: each gets a score by its step, and what was graded is listed. Nothing waits."""
    graded: list[str] = []
    meanwhile: list = []  # what happens while a model is graded
    scores = {"step_000010": 0.25, "step_000020": 0.75, "step_000030": 0.75, "average": 0.9}

    def answer(asked: Asked, is_stopped) -> bool:
        model = Path(asked.model).name
        graded.append(model)
        for work in meanwhile:
            work()
            assert not is_stopped()
        score = scores[model]
        found = {"score": score, "scores": {"pass@1": score}, "questions": len(asked.questions), "num_samples": 1}
        results = found | {"dataset_name": "heldout", "made_of": asked.made_of}
        (asked.options.output / RESULTS).write_text(json.dumps(results))
        return True

    monkeypatch.setattr(watch, "answer_apart", answer)
    monkeypatch.setattr(watch, "POLL", 0.0)
    return SimpleNamespace(graded=graded, meanwhile=meanwhile)


def summary_of(run: RunFolder) -> dict:
    return json.loads((run.evaluation / "summary.json").read_text())


def test_what_is_there_is_graded_once_and_the_best_step_is_named(inputs, tmp_path, answers, capsys):
    run = RunFolder(tmp_path / "run")
    stand(run, "stopped")
    for step in (10, 20, 30):
        export(inputs, run, step)
    shutil.copytree(run.export(20), run.exports / "step_000040.tmp")  # still being written
    shutil.copytree(run.export(20), run.exports / "step_000050.old.tmp")  # being removed
    shutil.copytree(run.export(20), run.path / "average")
    once = flags(inputs, run, "--once", "--also", str(run.path / "average"))
    assert main(once) == 0
    assert answers.graded == ["step_000010", "step_000020", "step_000030", "average"]
    printed = capsys.readouterr().out
    assert "best step by pass@1 on heldout: 20 (0.7500)\nall that is there is graded\n" in printed
    found = summary_of(run)
    assert found["best"] == {"heldout": {"step": 20, "model": "step_000020", "score": 0.75}}
    rows = [(entry["model"], entry["step"], entry["score"], entry["questions"]) for entry in found["results"]]
    assert rows[0] == ("step_000010", 10, 0.25, 3) and rows[-1] == ("average", None, 0.9, 3) and len(rows) == 4
    assert all((run.evaluation / entry["results"]).is_file() for entry in found["results"])
    assert found["watched"] == {"heldout": {"state": "done", "failed": {}}} and not list(run.evaluation.rglob("*.tmp"))
    assert main(once) == 0 and len(answers.graded) == 4, "the same model, data and prompts"
    assert "step_000010: graded before" in capsys.readouterr().out
    shutil.rmtree(run.export(10))
    export(inputs, run, 10, trained=11)  # again, after the run went back
    assert main(once) == 0 and answers.graded[4:] == ["step_000010"]
    shutil.rmtree(run.export(20))  # which no longer can be asked otherwise
    assert main([*once, "--system", "Be brief."]) == 0 and answers.graded[5:] == [
        "step_000010",
        "step_000030",
        "average",
    ]
    found = summary_of(run)
    assert {entry["model"]: entry["comparable"] for entry in found["results"]}["step_000020"] is False
    assert found["best"]["heldout"]["step"] == 30
    assert "asked otherwise than the newest: not compared" in summary_text(found)


def test_a_model_that_is_graded_by_itself_joins_them(inputs, tmp_path, answers):
    """As the stage behind training does it: into RUN/evaluation itself."""
    run = RunFolder(tmp_path / "run")
    stand(run, "done")
    run.config.write_text("checkpoint: {export_hf: true}\n")
    write_metrics(run.path, 10)
    export(inputs, run, 10)
    asked = ["--data", inputs / "heldout.jsonl", "--max-new-tokens", 8, "--batch-size", 4]
    alone = [*map(str, ["--model", inputs / "model", *asked, "--output", run.evaluation])]
    assert main(alone) == 0
    assert [(one["model"], one["name"]) for one in summary_of(run)["results"]] == [("model", "heldout")]
    assert "model, heldout" in run.report.read_text(encoding="utf-8")
    assert main(flags(inputs, run, "--once")) == 0
    found = summary_of(run)
    assert [(one["model"], one["comparable"]) for one in found["results"]] == [("step_000010", True), ("model", True)]
    assert found["best"]["heldout"]["step"] == 10, "a model of no step is not the best one"
    asked += ["--num-samples", "2", "--temperature", "0.7"]  # the newest, and no step
    assert main([*map(str, ["--model", inputs / "model", *asked, "--output", run.evaluation / "sampled"])]) == 0
    found = summary_of(run)
    joined = [(one["model"], one["name"], one["num_samples"], one["comparable"]) for one in found["results"]]
    assert joined[0] == ("step_000010", "heldout", 1, True) and found["best"]["heldout"]["step"] == 10
    assert sorted(joined[1:]) == [("model", "heldout", 1, True), ("model", "heldout", 2, False)]
    (run.evaluation / "sampled").rename(run.evaluation / "earlier.1")
    assert main(alone) == 0 and len(summary_of(run)["results"]) == 2, "what was set aside is not shown"
    found = summary_of(run)
    assert main([*alone[:-1], str(tmp_path / "elsewhere")]) == 0
    assert not (tmp_path / "summary.json").exists() and summary_of(run) == found


def test_results_under_several_names_have_a_best_step_each(tmp_path):
    run = RunFolder(tmp_path)
    for model, name, score in (("step_000005", "a", 0.5), ("step_000009", "b", 0.0), ("average", "b", 1.0)):
        folder = run.evaluation / model / name
        folder.mkdir(parents=True)
        results = {"dataset_name": name, "score": score, "scores": {"pass@1": score}, "questions": 2, "num_samples": 1}
        (folder / RESULTS).write_text(json.dumps(results | {"made_of": {"model": model, "data": name}}))
    (run.evaluation / "step_000005" / "c").mkdir()
    (run.evaluation / "step_000005" / "c" / RESULTS).write_text("{")
    assert {name: at["step"] for name, at in summarise(run)["best"].items()} == {"a": 5, "b": 9}


def test_a_model_that_cannot_be_graded_does_not_stop_the_others(inputs, tmp_path, answers, capsys):
    run = RunFolder(tmp_path / "run")
    stand(run, "done")
    for step in (10, 20):
        export(inputs, run, step)
    held = run.evaluation / "step_000005" / "heldout" / apart.HELD  # of a process that was killed
    held.mkdir(parents=True)
    (run.export(10) / "tokenizer.json").write_text("{")
    (run.export(10) / "tokenizer_config.json").write_text("{")
    assert main(flags(inputs, run, "--also", str(tmp_path / "nowhere"), "--once")) == 1
    assert answers.graded == ["step_000020"]
    found = summary_of(run)
    watched = found["watched"]["heldout"]
    assert watched["failed"].keys() == {"step_000010", "nowhere"} and watched["state"] == "failed"
    assert not held.exists()
    assert watched["failed"]["step_000010"].startswith(f"--model {run.export(10)} cannot be loaded")
    assert "step_000010      heldout          could not be graded" in capsys.readouterr().out
    assert found["best"]["heldout"]["step"] == 20
    write_metrics(run.path, 10)
    assert main(flags(inputs, run, "--name", "second", "--limit", "2", "--once")) == 1
    (run.export(10) / "tokenizer.json").write_text((inputs / "model" / "tokenizer.json").read_text())
    (run.export(10) / "tokenizer_config.json").write_text((inputs / "model" / "tokenizer_config.json").read_text())
    assert main(flags(inputs, run, "--name", "second", "--limit", "2", "--once")) == 0
    found = summary_of(run)["watched"]
    assert found == {"heldout": watched, "second": {"state": "done", "failed": {}}}, "each name speaks for itself"
    page = run.report.read_text(encoding="utf-8")
    assert "step_000010, heldout" in page and f"not graded: --model {run.export(10)} cannot be loaded" in page
    assert page.count("not graded: ") == 2


def test_an_export_that_is_removed_before_its_turn_is_told(inputs, tmp_path, answers):
    """It came and went while another one was graded."""
    run = RunFolder(tmp_path / "run")
    stand(run, "running")
    export(inputs, run, 10)
    answers.meanwhile += [lambda: export(inputs, run, 20), lambda: run.remove_checkpoint(20)]
    answers.meanwhile += [lambda: stand(run, "done"), answers.meanwhile.clear]
    assert main(flags(inputs, run)) == 1 and answers.graded == ["step_000010"]
    assert summary_of(run)["watched"]["heldout"]["failed"] == {
        "step_000020": f"{run.export(20)} was removed before it was graded; keep more (--checkpoint.keep)"
    }


@pytest.mark.parametrize("midway", [False, True])
def test_a_run_that_is_begun_anew_ends_it(inputs, tmp_path, answers, monkeypatch, capsys, midway):
    """While a model is graded, or between two: nothing of the old run is written among the results of the new one."""
    run = RunFolder(tmp_path / "run")
    stand(run, "running")
    export(inputs, run, 10)

    def anew() -> None:
        aside.append(run.set_aside())
        stand(run, "running")
        export(inputs, run, 20)

    def in_the_middle(asked: Asked, is_stopped) -> bool:
        anew()
        return not is_stopped()

    aside: list = []
    if midway:
        monkeypatch.setattr(watch, "answer_apart", in_the_middle)
    else:
        monkeypatch.setattr(watch.Watch, "_sleep", lambda self: anew())
    assert main(flags(inputs, run)) == 1
    said = capsys.readouterr()
    assert said.out.endswith(f"{run.path} was begun anew, and its results were set aside; the same command goes on\n")
    assert "error" not in said.err and "Traceback" not in said.err
    assert not list(run.path.glob("evaluation/**/*.json")) and (aside[0] / "evaluation" / "summary.json").exists()


def test_when_there_is_nothing_to_wait_for(inputs, tmp_path, answers, monkeypatch, capsys):
    run = RunFolder(tmp_path / "run")
    export(inputs, run, 10)
    monkeypatch.setattr(watch, "PATIENCE", 0.0)
    for state, status in (("done", 0), ("failed", 1), ("running", 1), ("refused", 1)):
        stand(run, state, reason="why not")
        assert main(flags(inputs, run)) == status
        assert ("the same command goes on" in capsys.readouterr().out) == bool(status)
    stand(run, "refused", run={"state": "done"})  # a second start of a run that is done
    assert main(flags(inputs, run)) == 0
    assert answers.graded == ["step_000010"]
    options = read_options(flags(inputs, run))
    waiting = watch.Watch(run, "heldout", options, [], SimpleNamespace(signal=0), SimpleNamespace())
    stand(run, "stopped")  # the next job of a chain goes on
    assert waiting.why_over() is None
    monkeypatch.setattr(watch, "PATIENCE", 5.0)
    stand(run, "running")
    clock = [0.0]
    monkeypatch.setattr(watch.time, "monotonic", lambda: clock[0])
    found = []
    for beat in (1, 2, 2, 2):
        run.lock.write_text("{}")
        os.utime(run.lock, (beat, beat))
        found.append(waiting.why_over())
        clock[0] += 4.0
    assert found[:3] == [None] * 3 and "gives no sign of life" in found[3]


def test_files_are_held_by_links_and_without_links_where_they_are(inputs, tmp_path, monkeypatch):
    run = RunFolder(tmp_path)
    folder, held = export(inputs, run, 10), tmp_path / "evaluation" / apart.HELD
    wanted = (folder / "model.safetensors").read_bytes()
    with apart.held_still(folder, held) as place:
        assert place == held and (held / "model.safetensors").samefile(folder / "model.safetensors")
        shutil.rmtree(folder)
        assert (place / "model.safetensors").read_bytes() == wanted
    assert not held.exists()
    with apart.held_still(folder, held) as place:
        assert place == folder and not held.exists(), "which is gone, as who reads it will find"
    folder = export(inputs, run, 20)

    def refuse(*_: object, **__: object) -> None:
        raise OSError("no links here")

    monkeypatch.setattr(os, "link", refuse)
    with apart.held_still(folder, held) as place:
        assert place == folder
    assert folder.exists() and not held.exists()


def start(inputs: Path, run: RunFolder, *extra: str) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", SCRIPT, *flags(inputs, run, *extra)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def until(process: subprocess.Popen, condition) -> None:
    """Waits for a condition while the process lives."""
    limit = time.monotonic() + 180
    while not condition():
        assert process.poll() is None and time.monotonic() < limit, process.communicate()
        time.sleep(0.05)


@pytest.mark.slow
def test_a_job_of_its_own_is_stopped_goes_on_and_ends_with_the_run(inputs, tmp_path, capsys):
    """Killed models, removed exports, a signal, a second job: what a cluster does to it, with real models."""
    run = RunFolder(tmp_path / "run")
    stand(run, "running")
    export(inputs, run, 10)
    held = run.evaluation / "step_000010" / "heldout" / apart.HELD
    process = start(inputs, run, "--num-workers", "2", "--max-new-tokens", "20000", "--batch-size", "1")
    mine = psutil.Process(process.pid)
    until(process, lambda: held.exists() and len(mine.children(recursive=True)) >= 4)  # it, two workers, a tracker
    children = mine.children(recursive=True)
    assert main(flags(inputs, run)) == 2
    assert "another process grades heldout there; wait for it" in capsys.readouterr().err
    process.terminate()
    printed, errors = process.communicate(timeout=20)
    assert process.returncode == 0, errors
    assert printed.endswith("SIGTERM was received: stopped; the same command goes on\n")
    assert (
        summary_of(run)["watched"]["heldout"]["state"] == "stopped"
        and not held.exists()
        and not list(run.evaluation.rglob(RESULTS))
    )
    assert psutil.wait_procs(children, timeout=10)[1] == []

    process = start(inputs, run)
    try:
        until(process, held.exists)
        run.remove_checkpoint(10)  # by retention, in the middle
        until(process, lambda: (held.parent / RESULTS).exists())
        torn = run.exports / "torn"
        export(inputs, run, 20).rename(torn)
        weights = torn / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:5000])
        torn.rename(run.export(20))
        until(process, lambda: "step_000020" in summary_of(run)["watched"]["heldout"]["failed"])
        export(inputs, run, 30)
        stand(run, "done")
        printed, errors = process.communicate(timeout=180)
    finally:
        process.kill()
    assert process.returncode == 1, errors
    assert (
        "step_000020      heldout          could not be graded: --model" in printed
        and "its weights cannot be loaded" in printed
    )
    assert [entry["model"] for entry in summary_of(run)["results"]] == ["step_000010", "step_000030"]
    results = json.loads((held.parent / RESULTS).read_text())
    assert results["model"] == str(run.export(10)) and results["generations"] == 3
    assert results["made_of"]["model"].startswith(f"{run.export(10)} [")
    assert printed.endswith("the run is done, and all is graded\n") and not list(run.evaluation.rglob("*.tmp"))


def test_a_run_that_exports_nothing_is_refused_before_it_is_waited_for(inputs, tmp_path, capsys):
    run = RunFolder(tmp_path)
    assert main(flags(inputs, run, "--once")) == 2
    assert "holds no export yet; leave out --once to wait for one" in capsys.readouterr().err
    run.config.write_text("checkpoint:\n  export_hf: false\n")
    assert main(flags(inputs, run)) == 2
    assert "exports no checkpoint; train with --checkpoint.export-hf, or name models with --also" in (
        capsys.readouterr().err
    )
    (tmp_path / "config.json").write_text("{}")
    assert main(flags(inputs, run)) == 2 and "is a model or data and no run" in capsys.readouterr().err


def test_a_recipe_says_how_and_the_run_says_which(inputs, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"output: RUN\nto_hf: {{}}\nevaluate:\n  data: {inputs / 'heldout.jsonl'}\n  max_new_tokens: 5\n")
    options = read_options([str(recipe), "--watch", "RUN", "--also", "a", "b"])
    assert (options.model, options.output, options.watch) == ("", Path(), Path("RUN"))
    assert (options.max_new_tokens, options.also) == (5, (Path("a"), Path("b")))
    options = read_options([str(recipe)])
    assert (options.model, options.output, options.watch) == ("RUN/final", Path("RUN/evaluation"), None)


def test_a_signal_to_all_processes_is_no_failure(monkeypatch):
    """The process of the model may die of it before the watching one has heard it."""
    seen = iter([False, True])
    monkeypatch.setattr(apart, "_answer", _killed)
    monkeypatch.setattr(apart, "_PAUSE", 0.0)
    monkeypatch.setattr(apart, "_LOOK", 20.0)
    assert apart.answer_apart(None, lambda: next(seen)) is False
    with pytest.raises(EvaluationError, match="its process ended by SIGTERM"):
        apart.answer_apart(None, lambda: False)


def _killed(asked: object, words: object) -> None:
    os.kill(os.getpid(), signal.SIGTERM)

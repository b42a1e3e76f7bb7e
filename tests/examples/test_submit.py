"""`lathe submit`: from flags to stages, scripts and jobs, on stand-ins of SLURM's commands."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from engine.run_folder import RunFolder
from examples import lathe, submit
from examples.cluster.options import SubmitOptions, read_options, seconds
from examples.cluster.script import Place, log_pattern, script_text
from examples.cluster.stages import Stage, links, plan_stages
from examples.demo.builtin import parse_over_demo
from tests.examples.test_recipes import EXPECTED, FOLDER
from tests.support.full_size import CONFIGS
from tests.support.slurm_commands import SlurmCommands, read_jobs

NASTY = 'it\'s a "run" $HOME `x` \\ #1'  # what a path may hold
FLAGS = ["--gpus-per-node", "0", "--ranks-per-node", "2", "--no-check-nodes"]


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    found = SlurmCommands(tmp_path / "slurm commands")
    found.put_on_path(monkeypatch)
    monkeypatch.chdir(tmp_path)
    return found


@pytest.fixture
def recipe(tmp_path):
    """A recipe of the built-in demo, with every section."""
    path = tmp_path / "recipe.yaml"
    (tmp_path / "questions.jsonl").touch()
    sections = {
        "output": "run",
        "steps": 4,
        "checkpoint": {"every": 2},
        "submit": {"nodes": 2, "jobs": 3, "stages": "train,average,evaluate"},
        "average": {"steps": "2,4", "format": "hf"},
        "to_hf": {"dtype": "source"},
        "evaluate": {"data": "questions.jsonl"},
    }
    path.write_text(yaml.safe_dump(sections), encoding="utf-8")
    return path


def dependencies(slurm: SlurmCommands) -> list[tuple[str, str]]:
    """For each job that was queued the name of its script and what it waits for."""
    calls = [
        (Path(call[-1]).stem, [word for word in call if word.startswith("--dep")]) for call in slurm.calls("sbatch")
    ]
    return [(name, flags[0].partition("=")[2] if flags else "") for name, flags in calls]


def test_a_chain_and_its_stages_are_queued_and_written_down(slurm, recipe, capsys):
    assert lathe.main(["submit", str(recipe), *FLAGS, "--time", "4:00:00", "--", "--tp", "2"]) == 0
    assert dependencies(slurm) == [
        ("train", ""),
        ("train", "afterany:101"),
        ("train", "afterany:102"),
        ("average", "afterany:101:102:103"),
        ("evaluate", "afterok:104"),
    ]
    assert all("--kill-on-invalid-dep=yes" in call for call in slurm.calls("sbatch")[1:])
    run = Path("run").resolve()
    record = read_jobs(run)
    assert record["command"][:3] == ["lathe", "submit", str(recipe)] and record["command"][-2:] == ["--tp", "2"]
    assert [(job["id"], job["stage"], job["number"], job["of"]) for job in record["jobs"]] == [
        ("101", "train", 1, 3),
        ("102", "train", 2, 3),
        ("103", "train", 3, 3),
        ("104", "average", 1, 1),
        ("105", "evaluate", 1, 1),
    ]
    assert record["jobs"][3]["after"] == ["101", "102", "103"]
    assert record["jobs"][1]["log"] == f"{run}/slurm/train-102.out"
    assert record["jobs"][1]["script"] == f"{run}/slurm/train.sh"
    assert "#SBATCH --time=4:00:00\n" in (run / "slurm" / "train.sh").read_text()
    assert "#SBATCH --nodes=2\n" in (run / "slurm" / "train.sh").read_text()
    assert "--time" not in (run / "slurm" / "average.sh").read_text()
    assert capsys.readouterr().out.splitlines()[:2] == ["101  train 1 of 3", "102  train 2 of 3, after 101"]


def test_the_jobs_read_the_recipe_as_it_was_with_the_flags_of_training(slurm, recipe):
    submit.main([str(recipe), *FLAGS, "--", "--tp", "2", "--output", "another"])
    frozen = Path("another/slurm/recipe.yaml").resolve()
    wanted = parse_over_demo([str(recipe), "--tp", "2", "--output", "another"])
    assert parse_over_demo([str(frozen)]) == wanted and wanted.tp == 2
    content = yaml.safe_load(frozen.read_text())
    assert content["average"] == {"steps": "2,4", "format": "hf"} and "submit" not in content
    assert str(frozen) in Path("another/slurm/evaluate.sh").read_text()


def test_a_second_chain_is_refused_while_the_first_is_queued(slurm, recipe, capsys):
    assert submit.main([str(recipe), *FLAGS]) == 0
    assert submit.main([str(recipe), *FLAGS]) == 2
    said = capsys.readouterr().err
    assert "its jobs 101, 102, 103, 104, 105 are still queued or running" in said and "lathe jobs" in said
    assert len(slurm.calls("sbatch")) == 5
    slurm.set_queue([f"{number}|N/A|COMPLETED|None|1:00|0:00|node1" for number in range(101, 106)])
    for step in (2, 4):
        RunFolder("run").checkpoint(step).mkdir(parents=True)
    assert submit.main([str(recipe), *FLAGS, "--jobs", "0"]) == 0
    assert dependencies(slurm)[5:] == [("average", ""), ("evaluate", "afterok:106")]
    assert len(read_jobs(Path("run"))["jobs"]) == 7


def test_where_one_job_is_refused_none_stays_queued(slurm, recipe, capsys):
    slurm.write("refuse", "2")
    assert submit.main([str(recipe), *FLAGS]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: sbatch failed: sbatch: error: QOSMaxSubmitJobPerUserLimit") and "101, 102" in said
    assert slurm.calls("scancel") == [["101", "102"]]
    slurm.write("scancel", "#!/bin/sh\nexit 1\n")
    slurm.set_queue([])
    assert submit.main([str(recipe), *FLAGS]) == 2
    assert "is still there (scancel failed: exit status 1): scancel 101 102" in capsys.readouterr().err


def test_a_round_waits_for_the_jobs_of_another(slurm, recipe, capsys):
    submit.main([str(recipe), *FLAGS, "--jobs", "1"])
    second = [str(recipe), *FLAGS, "--jobs", "2", "--stages", "train", "--after", "run", "--", "--output", "second"]
    assert submit.main(second) == 0
    assert dependencies(slurm)[3:] == [("train", "afterany:101:102:103"), ("train", "afterany:104")]
    third = [str(recipe), *FLAGS, "--after", "typo", "--", "--output", "third"]
    assert submit.main(third) == 2 and len(slurm.calls("sbatch")) == 5
    assert "--after typo: no jobs were queued for it" in capsys.readouterr().err


def test_preparing_comes_first_and_must_succeed():
    stages = [
        Stage(name="prepare", command=()),
        Stage(name="train", command=(), jobs=2),
        Stage(name="export", command=()),
    ]
    found = {link.key: (link.after_success, link.after_end) for link in links(stages)}
    prepared = (("prepare", 1),)
    assert found == {
        ("prepare", 1): ((), ()),
        ("train", 1): (prepared, ()),
        ("train", 2): (prepared, (("train", 1),)),
        ("export", 1): (prepared, (("train", 1), ("train", 2))),
    }


def test_exports_are_graded_beside_training(slurm, recipe, capsys):
    given = [str(recipe), *FLAGS, "--stages", "train,watch,average", "--jobs", "2", "--time", "60"]
    assert submit.main(given) == 2
    assert "--stages watch grades what training exports, and it exports nothing" in capsys.readouterr().err
    assert submit.main([*given, "--", "--checkpoint.export-hf"]) == 0
    assert dependencies(slurm) == [
        ("train", ""),
        ("train", "afterany:101"),
        ("watch", "after:101"),
        ("watch", "afterany:103,after:102"),
        ("watch-rest", "afterany:101:102:104"),
        ("average", "afterany:101:102"),
    ]
    run = Path("run").resolve()
    script = (run / "slurm" / "watch.sh").read_text()
    assert f'stage_job.sh" evaluate {run}/slurm/recipe.yaml --watch {run}\n' in script
    assert "#SBATCH --time=60\n" in script and "export LATHE_AT_ONCE=1" in script
    rest = (run / "slurm" / "watch-rest.sh").read_text()
    assert f"--watch {run} --once\n" in rest and "export LATHE_AT_ONCE=1" in rest and "--time=60" not in rest


def test_a_sweep_is_an_array_and_a_comparison(slurm, recipe):
    training = ["--output", "sweep", "--optim.schedule", "constant"]
    sweep = ["--lrs", "1e-5,2e-5", "--stages", "train", "--jobs", "1", "--", *training]
    assert submit.main([str(recipe), *FLAGS, *sweep]) == 0
    assert dependencies(slurm) == [("train", ""), ("compare", "afterany:101")]
    run = Path("sweep").resolve()
    script = (run / "slurm" / "train.sh").read_text()
    assert "#SBATCH --array=0-1\n" in script and f"#SBATCH --output={run}/slurm/train-%A_%a.out\n" in script
    assert read_jobs(run)["jobs"][0]["log"] == f"{run}/slurm/train-101_%a.out"
    assert f'stage_job.sh" sweep --lrs 1e-05,2e-05 --output {run}\n' in (run / "slurm" / "compare.sh").read_text()


def said_by(script: Path, home: Path, **environment: str) -> dict:
    """What a script hands over to the one that it sources: its arguments and variables, as bash holds them."""
    helper = home / "examples" / "slurm"
    helper.mkdir(parents=True, exist_ok=True)
    names = "LATHE_RUN LATHE_RANKS LATHE_RETRIES LATHE_SETUP LATHE_PYTHON LATHE_UNTIL_DONE TOKEN"
    show = f"""printf '%s\\0' "$@" > "$SEEN/arguments"
for name in {names}; do printf '%s\\0%s\\0' "$name" "${{!name:-}}"; done > "$SEEN/variables"
printf '%s\\0' "${{LATHE_SRUN[@]:-}}" > "$SEEN/srun"
"""
    for name in ("train_job.sh", "stage_job.sh"):
        (helper / name).write_text(show, encoding="utf-8")
    seen = home / "seen"
    seen.mkdir(exist_ok=True)
    subprocess.run(["bash", str(script)], env=os.environ | {"SEEN": str(seen)} | environment, check=True)
    words = {path.name: path.read_text(encoding="utf-8").split("\0")[:-1] for path in seen.iterdir()}
    pairs = words.pop("variables")
    return words | dict(zip(pairs[::2], pairs[1::2], strict=True))


def test_a_script_hands_over_exactly_what_was_given(tmp_path):
    home, run = tmp_path / f"lathe {NASTY.replace('/', '')}", tmp_path / "run of 'mine'"
    env = tmp_path / "env 'file'"
    env.write_text("TOKEN='a b'\n", encoding="utf-8")
    options = SubmitOptions(
        setup="module load 'x y' && export A=\"$B\"",
        env=env,
        container="/images/my image.sqsh",
        mounts=("/data/$x y:/data",),
        retries=7,
        ranks_per_node=4,
        until_done=True,
        check_nodes=False,
        job_name=NASTY,
    )
    place = Place(home=home, working=tmp_path, run=run, scripts=run / "slurm", python="/opt/my python", job_name=NASTY)
    command = ("recipe 'x'.yaml", "--log.wandb-project", NASTY, "")
    script = tmp_path / "script.sh"
    script.write_text(script_text(options, place, Stage(name="train", command=command), 8, "bf16"), encoding="utf-8")
    found = said_by(script, home)
    assert found["arguments"] == list(command)
    assert found["srun"] == [
        "--container-image=/images/my image.sqsh",
        f"--container-mounts={home}:{home},{tmp_path}:{tmp_path},/data/$x y:/data",
        f"--container-workdir={tmp_path}",
    ]
    assert (found["LATHE_RUN"], found["LATHE_PYTHON"]) == (str(run), "/opt/my python")
    assert (found["LATHE_RANKS"], found["LATHE_RETRIES"], found["LATHE_UNTIL_DONE"]) == ("4", "7", "1")
    assert (found["LATHE_SETUP"], found["TOKEN"]) == (options.setup, "a b")
    assert "a b" not in script.read_text()
    check_shell(script)
    env.unlink()
    with pytest.raises(subprocess.CalledProcessError, match="exit status 3"):
        said_by(script, home)


def test_apptainer_is_what_srun_starts(tmp_path):
    options = SubmitOptions(container="image.sif", container_runtime="apptainer", mounts=("/data",), check_nodes=False)
    place = Place(home=tmp_path, working=tmp_path, run=tmp_path / "r", scripts=tmp_path, python="python3", job_name="r")
    script = tmp_path / "script.sh"
    script.write_text(script_text(options, place, Stage(name="average", command=("average",)), 8, "bf16"))
    own = ["--bind", f"{tmp_path}:{tmp_path}", "--bind", "/data:/data", "image.sif"]
    assert said_by(script, tmp_path)["srun"] == ["apptainer", "exec", "--nv", "--pwd", str(tmp_path), *own]


def test_a_task_of_a_sweep_trains_its_own_rate(tmp_path):
    place = Place(home=tmp_path, working=tmp_path, run=tmp_path / "s w", scripts=tmp_path, python="p", job_name="s")
    stage = Stage(name="train", command=("recipe.yaml",), rates=(1e-5, 2.5e-5))
    script = tmp_path / "script.sh"
    script.write_text(script_text(SubmitOptions(check_nodes=False), place, stage, 8, "bf16"), encoding="utf-8")
    found = said_by(script, tmp_path, SLURM_ARRAY_TASK_ID="1")
    output = str(tmp_path / "s w" / "lr_2.5e-05")
    assert found["LATHE_RUN"] == output
    assert found["arguments"] == ["recipe.yaml", "--output", output, "--optim.lr", "2.5e-05"]
    assert log_pattern(place, stage) == f"{tmp_path}/train-%A_%a.out"
    check_shell(script)


def check_shell(*scripts: Path) -> None:
    """shellcheck finds nothing in them."""
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed")
    done = subprocess.run(["shellcheck", *map(str, scripts)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def shown(printed: str) -> dict[str, str]:
    """The files of a dry run, by their paths."""
    parts = re.split(r"^==> (.*) <==\n", printed, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_every_recipe_makes_scripts_that_shellcheck_passes(name, slurm, tmp_path, capsys):
    assert lathe.main(["submit", str(FOLDER / f"{name}.yaml"), "--dry-run", "--jobs", "2"]) == 0
    files = shown(capsys.readouterr().out)
    scripts = {Path(path).stem: text for path, text in files.items() if path.endswith(".sh")}
    made = "average" if "reasoning" in name else "export"
    assert list(scripts) == ["prepare", "train", made, "evaluate"]
    nodes = int(re.search(r"--nodes=(\d+)", scripts["train"])[1])
    assert nodes * 8 == EXPECTED[name].ranks
    for stem, text in scripts.items():
        (tmp_path / f"{stem}.sh").write_text(text, encoding="utf-8")
    check_shell(*(tmp_path / f"{stem}.sh" for stem in scripts))
    assert slurm.calls("sbatch") == [] and not Path("runs").exists()


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--node", "2"], "unknown flag of submit --node; the nearest is --nodes; flags of training stand behind --"),
        (["--tp", "2"], "flags of training stand behind --"),
        (["--nodes", "4", "olmo.yaml"], "olmo.yaml belongs to no flag; recipes stand before all flags: lathe submit"),
        (["--stages", "train,averge"], "--stages train,averge: unknown stage averge; the nearest is average"),
        (["--jobs", "0", "--stages", "train"], "--jobs 0 leaves nothing to queue"),
        (["--until-done", "--jobs", "3"], "--until-done is one job that goes on; leave --jobs 3 out"),
        (["--lrs", "1e-5,2e-5"], "--lrs 1e-5,2e-5 trains several runs and compares them: give --stages train"),
        (["--stages", "train", "--lrs", "0"], "--lrs 0: give rates above 0"),
        (["--time", "4h"], "--time 4h: give minutes, or D-HH:MM:SS"),
        (["--nodes", "0"], "--nodes 0 must be at least 1"),
        (["--gpus-per-node", "0", "--ranks-per-node", "0"], "gives a node no rank: add --ranks-per-node"),
        (["--mounts", "/data"], "--mounts /data is for a container: add --container IMAGE"),
        (["--container", "i", "--mounts", "data"], "--mounts data: give DIR or DIR:DIR-INSIDE"),
        (["--sbatch", "qos"], "--sbatch qos: give a flag of sbatch with its dashes"),
        (["--setup", "echo 'x"], "--setup echo 'x: bash does not read it"),
        (["--env", "nowhere"], "--env nowhere: there is no such file"),
        (["--account", "a\nb"], "--account 'a\\nb' is no name"),
        (["--stages", "train,publish,export", "--", "--tp", "3"], "16 ranks cannot be split as tp 3"),
        (["--stages", "prepare,train"], "has no section `prepare:`"),
        (["--", "--checkpoint.no-resume"], "--checkpoint.no-resume would do its work in each of --jobs 3"),
        (["--time", "30", "--", "--checkpoint.minutes-before-end", "40"], "is not shorter than a job of --time 30"),
        (["--", "--data", "gone", "--model", "m"], "--data gone: there is no such directory; add prepare to --stages"),
        (["--", "--output", "/proc/run"], "--output /proc/run: nothing can be written in /proc"),
        (["--", "--output", "model"], "holds a model, data or a checkpoint"),
        (["--container", "i", "--", "--output", "/x/run"], "is not seen in the container: add it to --mounts"),
    ],
)
def test_mistakes_are_one_sentence_and_nothing_is_queued(flags, sentence, slurm, recipe, capsys):
    Path("model").mkdir()
    Path("model/config.json").write_text("{}")
    assert submit.main([str(recipe), *flags]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1, said
    assert sentence in said
    assert slurm.calls("sbatch") == [] and not Path("run").exists()


def test_wrong_sections_are_found_before_anything_is_queued(slurm, recipe, capsys):
    content = yaml.safe_load(recipe.read_text())
    for changes, sentence in (
        ({"average": {"format": "hf"}}, "the section `average:` lacks steps"),
        ({"average": {"step": "2"}}, "unknown recipe key average.step; the nearest is average.steps"),
        ({"evaluate": {"data": "q", "num_samples": 4}}, "--num-samples 4 would give the same greedy answer"),
        ({"submit": {"node": 2}}, "unknown recipe key submit.node; the nearest is submit.nodes"),
    ):
        recipe.write_text(yaml.safe_dump(content | changes), encoding="utf-8")
        assert submit.main([str(recipe), *FLAGS]) == 2
        assert sentence in capsys.readouterr().err
    assert slurm.calls("sbatch") == []


def test_a_layout_that_the_model_does_not_allow_is_refused(slurm, recipe, capsys):
    Path("model").mkdir()
    Path("model/config.json").write_text(json.dumps(CONFIGS["Qwen2.5-Math-1.5B"]), encoding="utf-8")
    Path("data").mkdir()
    given = [str(recipe), *FLAGS, "--stages", "train", "--", "--model", "model", "--data", "data", "--tp"]
    assert submit.main([*given, "4"]) == 2
    assert capsys.readouterr().err.startswith("error: --tp 4 does not divide the key-value heads (2)")
    assert slurm.calls("sbatch") == []
    assert submit.main([*given, "2"]) == 0
    assert "model: tp 2 x cp 1 x pp 1 x dp 2 = 4 ranks, GiB per rank" in capsys.readouterr().out
    assert "CUDA_VISIBLE_DEVICES" not in os.environ


def test_flags_win_over_the_recipe_and_over_defaults(recipe):
    options, files, training = read_options([str(recipe), "--nodes", "4", "--", "--tp", "2"])
    assert (options.nodes, options.jobs, options.chosen) == (4, 3, ["train", "average", "evaluate"])
    assert (files, training) == ([recipe], ["--tp", "2"])
    assert read_options(["--nodes", "4", "--", str(recipe), "--tp", "2"]) == (options, files, training)
    assert replace(options, jobs=0).chosen == ["average", "evaluate"]


def test_a_place_for_each_stage():
    options = SubmitOptions(stages="evaluate,train,average", partition="gpu", stage_partition="cpu", stage_time="60")
    train, average, evaluate = plan_stages(options, Path("r.yaml"), Path("run"))
    assert (train.partition, train.gpus, train.time) == ("gpu", 8, None)
    assert (average.partition, average.gpus, average.time) == ("cpu", 0, "60")
    assert (evaluate.gpus, evaluate.command) == (8, ("evaluate", "r.yaml"))


def test_times_are_read_as_slurm_does():
    texts = ("30", "1:30", "4:00:00", "2-0", "1-2:30", "1-02:03:04", "4h", "")
    assert [seconds(text) for text in texts] == [1800, 90, 14400, 172800, 95400, 93784, None, None]


def test_without_slurm_it_says_so(recipe, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", "/usr/bin" if not Path("/usr/bin/sbatch").exists() else str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert submit.main([str(recipe), *FLAGS]) == 2
    assert "there is no sbatch on this machine" in capsys.readouterr().err


def test_what_was_queued_does_not_make_a_run_look_used(slurm, recipe):
    submit.main([str(recipe), *FLAGS])
    run = RunFolder("run")
    assert not run.is_foreign() and run.set_aside() is None and json.loads(run.jobs.read_text())["jobs"]

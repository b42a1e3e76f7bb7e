"""`lathe COMMAND`: the scripts under one name, and what it says where it was mistyped."""

import os
import sys

import pytest

from engine.run_folder import RunFolder
from engine.run_status import read_status
from examples import lathe


@pytest.fixture(autouse=True)
def program(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["lathe"])


@pytest.mark.parametrize("command", [name for name in lathe.COMMANDS if name != "train"])
def test_every_command_is_its_script(command, capsys):
    with pytest.raises(SystemExit) as ended:
        lathe.main([command, "--help"])
    assert ended.value.code == 0
    assert f"usage: lathe {command} " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["averge"], "lathe has no command averge; the nearest is average"),
        (["compare", "A"], "lathe compare takes two paths first"),
        (["compare", "A", "--num-workers", "2"], "lathe compare takes two paths first"),
        (["train", "--nproc", "none"], "--nproc none: give how many processes this node starts"),
        (["train", "--nproc=3", "--tp", "2"], "3 ranks cannot be split as tp 2"),
        (["train", "--nproc", "2", "--model", "M"], "--data is missing"),
    ],
)
def test_mistakes_are_one_sentence(arguments, sentence, capsys):
    assert lathe.main(arguments) == 2
    assert capsys.readouterr().err.startswith(f"error: {sentence}")


@pytest.mark.parametrize(
    ("flags", "reason"),
    [(["--tp", "2"], "3 ranks cannot be split as tp 2"), (["--seq-lenn", "8"], "a flag is mistyped")],
)
def test_a_mistake_before_processes_start_is_written_down(flags, reason, tmp_path):
    assert lathe.main(["train", "--nproc", "3", *flags, "--output", str(tmp_path)]) == 2
    status = read_status(RunFolder(tmp_path))
    assert status["state"] == "refused" and status["reason"].startswith(reason)
    assert lathe.main(["train", "--nproc", "3", "--help"]) == 0


@pytest.mark.parametrize(
    ("given", "started"),
    [
        (["--tp", "1"], ["pretrain_sft.py", "--tp", "1"]),
        (
            ["--tp", "2", "--nproc", "4"],
            [
                *["torch.distributed.run", "--signals-to-handle", "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1,SIGUSR2"],
                *["--nproc-per-node", "4", "pretrain_sft.py", "--tp", "2"],
            ],
        ),
    ],
)
def test_training_replaces_the_process(given, started, monkeypatch):
    replaced = []
    monkeypatch.setattr(os, "execv", lambda path, command: replaced.append((path, command)))
    lathe.main(["train", *given])
    ((path, command),) = replaced
    assert path == command[0] == sys.executable
    assert [os.path.basename(word) for word in command[1:] if word != "-m"] == started


def test_without_a_command_it_lists_them(capsys):
    assert lathe.main([]) == 0
    printed = capsys.readouterr().out
    assert all(f"\n  {command} " in printed for command in lathe.COMMANDS)

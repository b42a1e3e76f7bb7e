"""A run that has to stop before its end saves first, and continues as if it had not stopped."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from engine import signals
from engine import train as training
from engine.checkpointing.resume_point import find_resume_point
from engine.layout import world_from_environment
from engine.run_folder import RunFolder
from engine.run_status import read_status
from engine.signals import StopRequest, hear_early, reason, shielded
from engine.trainer import Trainer
from tests.engine.checkpointing.test_resume import metrics, run
from tests.support.marks import slow
from tests.support.tiny import make_inputs

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return make_inputs(tmp_path_factory.mktemp("inputs"), "qwen2_tied", 14)


def arguments(inputs: Path, output: Path, *extra: str) -> list[str]:
    fixed = ["--model", inputs / "model", "--data", inputs / "data", "--output", output, "--precision", "fp32"]
    return [*map(str, fixed), "--seq-len", "96", "--global-batch-size", "4", "--optim.lr", "1e-2", *extra]


def run_with_a_signal(arguments: list[str], at_step: int, number: int, environment: dict[str, str]) -> None:
    """Trains; the second rank receives a signal within a step."""
    step = Trainer.train_step

    def signalled(trainer: Trainer):
        if trainer.step + 1 == at_step and trainer.mesh.rank == 1:
            os.kill(os.getpid(), number)
        return step(trainer)

    Trainer.train_step = signalled
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a test run in the background may ignore
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        run(arguments, environment)
    finally:
        Trainer.train_step = step
        for name in environment:
            del os.environ[name]
    assert {number: signal.getsignal(number) for number in before} == before


@pytest.mark.parametrize("layout", [slow(""), slow("--tp 2"), "--pp 2"])
def test_a_signal_to_any_rank_saves_and_stops_all(pool, inputs, tmp_path, layout):
    extra = ("--steps", "6", *layout.split())
    pool.run(run, 2, arguments(inputs, tmp_path / "whole", *extra))
    stopped = arguments(inputs, tmp_path / "cut", *extra)
    pool.run(run_with_a_signal, 2, stopped, 3, signal.SIGTERM, {})
    assert find_resume_point(tmp_path / "cut").step == 3
    assert metrics(tmp_path / "cut") == metrics(tmp_path / "whole")[:3]
    pool.run(run_with_a_signal, 2, stopped, 5, signal.SIGINT, {})
    assert find_resume_point(tmp_path / "cut").step == 5
    pool.run(run, 2, stopped)
    assert metrics(tmp_path / "cut") == metrics(tmp_path / "whole")


def test_a_job_that_nears_its_time_limit_saves_and_stops(pool, inputs, tmp_path):
    flags = arguments(inputs, tmp_path / "run", "--steps", "6", "--checkpoint.minutes-before-end", "2")
    environment = {"SLURM_JOB_START_TIME": "0", "SLURM_JOB_END_TIME": str(int(time.time()) + 100)}
    pool.run(run_with_a_signal, 2, flags, 100, signal.SIGTERM, environment)
    assert find_resume_point(tmp_path / "run").step == 1
    words = "saved and stopped after step 1 of 6: the job's time limit is near\n"
    assert (tmp_path / "run" / "unfinished").read_text() == words
    environment["SLURM_JOB_END_TIME"] = str(int(time.time()) + 100_000)
    pool.run(run_with_a_signal, 2, flags, 100, signal.SIGTERM, environment)
    assert find_resume_point(tmp_path / "run").step == 6 and not (tmp_path / "run" / "unfinished").exists()
    assert 0 < read_status(RunFolder(tmp_path / "run"))["save_seconds"] < 60


@pytest.fixture
def listening():
    """This process hears SIGINT, even if it was started in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
def test_a_second_interrupt_interrupts(first, listening):
    with pytest.raises(KeyboardInterrupt), StopRequest().listening():
        signal.raise_signal(first)  # noted
        signal.raise_signal(signal.SIGTERM)  # a scheduler and torchrun send one each
        signal.raise_signal(signal.SIGINT)


def test_no_interrupt_interrupts_a_save(listening):
    """Whichever thread the kernel gives it to."""
    done = []
    with pytest.raises(KeyboardInterrupt), StopRequest().listening():
        with shielded():
            for _ in range(3):
                sender = threading.Thread(target=signal.raise_signal, args=(signal.SIGINT,))
                with unblocked():
                    sender.start()
                sender.join()
            time.sleep(0.1)
            done.append("saved")
        done.append("not interrupted")
    assert done == ["saved"]


@contextlib.contextmanager
def unblocked():
    """Threads started here hear every signal, like those that were started before a save."""
    before = signal.pthread_sigmask(signal.SIG_SETMASK, [])
    yield
    signal.pthread_sigmask(signal.SIG_SETMASK, before)


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM])
def test_what_schedulers_send_is_noted_and_does_not_kill(number):
    stop = StopRequest()
    with stop.listening():
        assert reason(stop.number()) is None
        signal.raise_signal(number)
        signal.raise_signal(number)
    assert reason(stop.number()) == f"{number.name} was received"


def test_a_signal_before_training_is_not_lost(listening, monkeypatch):
    monkeypatch.setattr(signals, "_early", 0)
    before = {number: signal.getsignal(number) for number in signals.SIGNALS}
    try:
        hear_early()
        stop = StopRequest()
        signal.raise_signal(signal.SIGUSR1)  # between the two
        with stop.listening():
            assert reason(stop.number()) == "SIGUSR1 was received"
        assert reason(StopRequest().number()) == "SIGUSR1 was received"
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


EARLY = """
import sys
from engine import signals
from examples import pretrain_sft
hear = signals.hear_early
signals.hear_early = lambda: (hear(), print("heard", "torch" in sys.modules))
sys.exit(pretrain_sft.main(["--seq-len", "0"]))
"""


def test_signals_are_heard_before_torch_is_imported():
    done = subprocess.run([sys.executable, "-c", EARLY], capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout.startswith("heard False\n")


def run_with_an_early_signal(arguments: list[str], number: int) -> None:
    """Trains; the second rank receives a signal while it reads the weights."""
    begin = Trainer.__init__

    def signalled(trainer: Trainer, prepared, mesh) -> None:
        if mesh.rank == 1:
            os.kill(os.getpid(), number)
        begin(trainer, prepared, mesh)

    Trainer.__init__ = signalled
    try:
        run(arguments)
    finally:
        Trainer.__init__ = begin


def test_a_signal_in_start_up_stops_before_the_first_step(pool, inputs, tmp_path):
    extra = ("--steps", "4", "--checkpoint.every", "2")
    flags = arguments(inputs, tmp_path / "cut", *extra)
    pool.run(run, 2, arguments(inputs, tmp_path / "whole", *extra))
    pool.run(run_with_an_early_signal, 2, flags, signal.SIGUSR2)
    words = "stopped while starting up, before step 1 of 4: SIGUSR2 was received\n"
    assert (tmp_path / "cut" / "unfinished").read_text() == words and find_resume_point(tmp_path / "cut") is None
    pool.run(run_with_a_signal, 2, flags, 3, signal.SIGUSR1, {})
    assert find_resume_point(tmp_path / "cut").step == 3
    pool.run(run_with_an_early_signal, 2, flags, signal.SIGUSR1)
    assert "before step 4 of 4: SIGUSR1" in (tmp_path / "cut" / "unfinished").read_text()
    pool.run(run, 2, flags)
    assert metrics(tmp_path / "cut") == metrics(tmp_path / "whole")


def run_with_a_signal_at_first(arguments: list[str], environment: dict[str, str]) -> None:
    """Trains; the second rank receives a signal while the ranks compare themselves, before RUN is made ready."""
    compare = training.check_agreement

    def signalled(prepared, device) -> list[str]:
        if world_from_environment()[0] == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return compare(prepared, device)

    training.check_agreement = signalled
    try:
        run(arguments, environment)
    finally:
        training.check_agreement = compare
        for name in environment:
            del os.environ[name]


def test_a_signal_before_a_run_is_set_aside_leaves_it_as_it_was(pool, inputs, tmp_path):
    output = RunFolder(tmp_path / "run")
    flags = arguments(inputs, output.path, "--steps", "2", "--checkpoint.every", "1")
    pool.run(run_with_a_signal_at_first, 2, [*flags, "--checkpoint.no-resume"], {})
    assert output.why_unfinished() == "stopped while starting up, before step 1 of 2: SIGTERM was received"
    pool.run(run, 2, flags)
    done = read_status(output)
    for flag in (["--checkpoint.no-resume"], ["--checkpoint.resume-from", "1"]):
        pool.run(run_with_a_signal_at_first, 2, [*flags, *flag], {})
        status = read_status(output)
        assert (status["state"], status["run"]) == ("stopped", done) and not output.why_unfinished()
    assert len(metrics(output.path)) == 2 and find_resume_point(output.path).step == 2
    again = [*flags, "--checkpoint.no-resume"]
    pool.run(run_with_an_early_signal, 2, again, signal.SIGTERM)  # which comes after it
    assert "before step 1 of 2" in output.why_unfinished() and "run" not in read_status(output)


def test_a_flag_has_done_its_work_whatever_stops_a_job_afterwards(pool, inputs, tmp_path):
    """A job that is started again, with another port, goes on from its last step and not from the flag's."""
    output = RunFolder(tmp_path / "run")
    flags = [*arguments(inputs, output.path, "--checkpoint.every", "1", "--checkpoint.resume-from", "1"), "--steps"]
    pool.run(run, 2, [*flags[:-3], "--steps", "2"])
    job = {"SLURM_JOB_ID": "7"}
    pool.run(run_with_a_signal, 2, [*flags, "1"], 9, signal.SIGTERM, {**job, "MASTER_PORT": "1"})
    assert read_status(output)["state"] == "done" and find_resume_point(output.path).step == 1
    assert read_status(output)["began_with"] == "--checkpoint.resume-from 1"
    job["SLURM_RESTART_COUNT"] = "1"
    pool.run(run_with_a_signal, 2, [*flags, "4"], 3, signal.SIGTERM, {**job, "MASTER_PORT": "2"})
    for port in ("3", "4"):
        pool.run(run_with_a_signal_at_first, 2, [*flags, "4"], {**job, "MASTER_PORT": port})
        assert output.why_unfinished().startswith("stopped while starting up, before step 4 of 4")
    assert read_status(output)["began_with"] == "--checkpoint.resume-from 1"
    assert find_resume_point(output.path).step == 3


def test_an_ignored_signal_stays_ignored(listening):
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with StopRequest().listening():
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN


@pytest.mark.parametrize("ranks", [slow(1), 2])
def test_sigterm_from_a_scheduler(inputs, tmp_path, ranks):
    """To the script, or to torchrun, which passes it on to all processes of every rank; after other saves."""
    script = str(ROOT / "examples" / "pretrain_sft.py")
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", str(ranks)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    log = tmp_path / "run" / "metrics.jsonl"
    command = [sys.executable, *(torchrun if ranks > 1 else []), script]
    command += arguments(inputs, tmp_path / "run", "--steps", "100000", "--checkpoint.every", "3")
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        while process.poll() is None and not (log.exists() and log.read_text().count("\n") > 7):
            time.sleep(0.01)
        process.terminate()
        printed, errors = process.communicate(timeout=120)
    if ranks == 1:  # torchrun's own status is that of a signal
        assert process.returncode == 0, errors
    step = find_resume_point(tmp_path / "run").step
    assert f"saved and stopped after step {step:,} of 100,000: SIGTERM was received" in printed
    assert len(metrics(tmp_path / "run")) == step and not list(tmp_path.rglob("*.tmp"))

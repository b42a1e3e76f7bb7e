"""One job at a time in RUN: a lock that names its owner, and that a job takes over from an owner who is gone."""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import socket
import subprocess
import threading
import time
import uuid
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

from engine.run_folder import BEING_WRITTEN, RunFolder

BEAT = 20.0  # seconds between signs of life
SILENCE = 600.0  # seconds without one after which an owner counts as dead
# The same for an owner in our own job: torchrun has started it anew on another node far more often than not.
OWN_SILENCE = 120.0
_TRIES = 20
_START = ("SLURM_JOB_ID", "TORCHELASTIC_RUN_ID", "MASTER_ADDR", "MASTER_PORT")


def this_start() -> str:
    """What all ranks of this start have in common, and those of no other job: the job and its meeting point."""
    values = [os.environ.get(name, "") for name in _START]
    if values[2] in ("", "localhost", "127.0.0.1"):
        values.append(socket.gethostname())
    return "/".join(values if values[3] else [*values, str(os.getpid())])


def this_process() -> dict[str, Any]:
    """Who takes a lock: host, pid and job for people, the rest to tell a process from a later one of the same pid."""
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "job": os.environ.get("SLURM_JOB_ID"),
        "restart": os.environ.get("SLURM_RESTART_COUNT"),
        "elastic": _elastic(),
        "since": now(),
        "born": _birth(os.getpid()),
        "machine": _machine(),
        "start": this_start(),
    }


def now() -> str:
    """The time with its date and zone."""
    return datetime.now().astimezone().isoformat(timespec="seconds")


def describe(owner: dict[str, Any]) -> str:
    """An owner in words."""
    job = f", SLURM job {owner['job']}" if owner.get("job") else ""
    return f"process {owner.get('pid', '?')} on {owner.get('host', '?')}{job}, since {owner.get('since', '?')}"


def read_lock(run: RunFolder) -> dict[str, Any] | None:
    """What the lock says of its owner; None where there is no lock, and little where it cannot be read."""
    return _read(run.lock)


def _read(path: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return found if isinstance(found, dict) else {}
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        return {}


def is_anothers(run: RunFolder) -> bool:
    """Whether a living job other than this start's owns RUN."""
    owner = read_lock(run)
    return owner is not None and owner.get("start") != this_start() and _why_dead(run, owner) is None


def release_dead(run: RunFolder) -> str | None:
    """Removes the lock of an owner who is gone; a sentence where there was one.

    For a job's script: where ranks run in a container they cannot ask SLURM, and would wait for the owner's silence.
    """
    owner = read_lock(run)
    why = owner and _why_dead(run, owner)
    return f"{run.path} is free, {describe(owner)}: {why}" if owner and why and _remove(run.lock, owner) else None


@contextlib.contextmanager
def held(run: RunFolder) -> Iterator[str | None]:
    """Holds the lock of RUN, which is made where it is missing; yields a sentence where a dead owner's was taken over.

    Call it on one rank. Raises ValueError, naming the owner, where another job has it, and OSError where nothing can
    be written. The file is made by one link or one exclusive creation, which holds on shared file systems too; a
    thread gives a sign of life every `BEAT` seconds.
    """
    run.path.mkdir(parents=True, exist_ok=True)
    own = this_process() | {"token": uuid.uuid4().hex}
    said = _take(run, own)
    over = threading.Event()
    beating = threading.Thread(target=_beat, args=(run, own, over), daemon=True, name="lock of RUN")
    beating.start()
    try:
        yield said
    finally:
        over.set()
        beating.join(timeout=5)
        if (read_lock(run) or {}).get("token") == own["token"]:
            with contextlib.suppress(OSError):
                run.lock.unlink()


def _take(run: RunFolder, own: dict[str, Any]) -> str | None:
    said = None
    for _ in range(_TRIES):
        if _create(run.lock, own):
            return said
        owner = read_lock(run)
        if owner is None:  # released at this moment
            continue
        why = _why_dead(run, owner, patient=True)
        if why is None:
            raise ValueError(
                f"--output {run.path} is in use by {describe(owner)}: wait for it, or give another --output (if that "
                f"process is certainly gone, remove {run.lock})"
            )
        if _remove(run.lock, owner):
            said = f"took over {run.path} from {describe(owner)}: {why}"
    raise ValueError(f"--output {run.path}: several jobs try to take {run.lock} at once; start one of them")


def _create(path: Path, own: dict[str, Any]) -> bool:
    """Makes the lock with its whole content, or says that there is one."""
    beside = path.with_name(f"{path.name}.{own['token']}{BEING_WRITTEN}")
    beside.write_text(json.dumps(own) + "\n", encoding="utf-8")
    try:
        os.link(beside, path)
        return True
    except FileExistsError:
        return False
    except OSError:  # a file system without links
        try:
            with path.open("x", encoding="utf-8") as stream:
                stream.write(json.dumps(own) + "\n")
            return True
        except FileExistsError:
            return False
    finally:
        beside.unlink(missing_ok=True)


def _remove(path: Path, owner: dict[str, Any]) -> bool:
    """Removes a dead owner's lock, and no other: another job may have taken it over in this moment."""
    aside = path.with_name(f"{path.name}.{uuid.uuid4().hex}{BEING_WRITTEN}")
    try:
        os.rename(path, aside)
    except FileNotFoundError:
        return False
    ours = (_read(aside) or {}).get("token") == owner.get("token")
    if not ours:
        try:
            os.link(aside, path)
        except FileExistsError:  # and yet another one has it
            pass
        except OSError:  # a file system without links
            os.rename(aside, path)
    aside.unlink(missing_ok=True)
    return ours


def _beat(run: RunFolder, own: dict[str, Any], over: threading.Event) -> None:
    """Gives signs of life; ends the process where another job took RUN over while this one stood still."""
    while not over.wait(BEAT):
        owner = read_lock(run)
        if owner is None:
            with contextlib.suppress(OSError):  # removed by hand
                _create(run.lock, own)
        elif owner and owner.get("token") != own["token"]:
            print(f"error: {run.path} was taken over by {describe(owner)}; this job ends", flush=True)
            os._exit(2)  # a save would ruin what the other one does
        else:
            with contextlib.suppress(OSError):
                os.utime(run.lock)


def _why_dead(run: RunFolder, owner: dict[str, Any], *, patient: bool = False) -> str | None:
    """Why the owner of the lock is gone; None while it lives, or may live.

    patient: waits for a sign of life of an owner in our own job, which torchrun has perhaps started anew, or on a
    machine of our name.
    """
    if owner.get("machine") is not None and owner["machine"] == _machine():
        return None if _lives(owner) else "that process is gone"
    rebooted = owner.get("host") == socket.gethostname() and _boot(owner.get("machine")) != _boot(_machine())
    if rebooted and _age(run) > _seconds_up():  # else it may be another machine of our name
        return "its machine was started anew since"
    job = owner.get("job")
    if job and job != os.environ.get("SLURM_JOB_ID") and not _slurm_knows(job):
        return f"SLURM runs no job {job} any more"
    if job and job == os.environ.get("SLURM_JOB_ID"):
        if owner.get("restart") != os.environ.get("SLURM_RESTART_COUNT"):
            return "the job was requeued since"
        return _wait_for_silence(run, OWN_SILENCE, patient=patient)
    if rebooted or (_elastic() is not None and owner.get("elastic") == _elastic()):
        return _wait_for_silence(run, OWN_SILENCE, patient=patient)
    return _wait_for_silence(run, SILENCE, patient=False)


def _wait_for_silence(run: RunFolder, limit: float, *, patient: bool) -> str | None:
    """Why an owner is silent for good; None as soon as it gives a sign of life, or at once where nobody waits."""
    first = _age(run)
    age = first
    while patient and age < limit:
        time.sleep(min(5.0, BEAT))
        before, age = age, _age(run)
        if age < before:
            return None
    return f"it gave no sign of life for {age / 60:.0f} minutes" if age >= limit else None


def _age(run: RunFolder) -> float:
    """Seconds since the last sign of life, by the clock of the file system alone."""
    clock = run.lock.with_name(f"{run.lock.name}.{uuid.uuid4().hex}{BEING_WRITTEN}")
    try:
        clock.touch()
        return clock.stat().st_mtime - run.lock.stat().st_mtime
    except OSError:
        return 0.0
    finally:
        clock.unlink(missing_ok=True)


def _slurm_knows(job: str) -> bool:
    """Whether SLURM still runs a job; also true where it cannot be asked."""
    if shutil.which("squeue") is None:
        return True
    try:
        asked = subprocess.run(["squeue", "-h", "-j", job, "-o", "%T"], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return True
    if asked.returncode:
        return "invalid job id" not in asked.stderr.lower()
    return bool(set(asked.stdout.split()) - {"PENDING"})


def _machine() -> str | None:
    """This boot of this machine, as far as its processes see one another: containers of one host may not."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
        return f"{socket.gethostname()} {boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return None


def _boot(machine: str | None) -> str | None:
    """The boot that `_machine` names."""
    return machine.split()[1] if machine and len(machine.split()) == 3 else None


def _seconds_up() -> float:
    """Seconds since this machine was started; infinity where it does not say so."""
    try:
        return float(Path("/proc/uptime").read_text(encoding="ascii").split()[0])
    except (OSError, ValueError):
        return math.inf


def _elastic() -> str | None:
    """What torchrun calls this job on all its nodes, however often it starts it again; None where it has no name."""
    name = os.environ.get("TORCHELASTIC_RUN_ID", "")
    return None if name in ("", "none") else name


def _birth(pid: int) -> str | None:
    """When a process of this machine started, in ticks since its boot; None for one that is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]  # the 3rd and the 22nd field of proc(5)


def _lives(owner: dict[str, Any]) -> bool:
    """Whether a process of this machine is there and is no later one of the same pid, nor this process itself."""
    born = _birth(int(owner.get("pid", 0)))
    return born is not None and born == owner.get("born") and owner.get("pid") != os.getpid()

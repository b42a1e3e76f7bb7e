"""torchrun as a job starts it: a node that waits for the first one hears signals."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

from examples.cluster import launcher


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def catches(pid: int, number: int) -> bool:
    """Whether a process has a handler for a signal, as the kernel knows it."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    caught = next(line.split()[1] for line in lines if line.startswith("SigCgt"))
    return bool(int(caught, 16) >> (number - 1) & 1)


def test_a_node_that_waits_for_the_first_one_ends_at_a_signal():
    command = [sys.executable, str(Path(launcher.__file__)), "--rdzv-endpoint", f"127.0.0.1:{free_port()}"]
    root = str(Path(launcher.__file__).parents[2])
    environment = os.environ | {"SLURM_NODEID": "1", "PYTHONPATH": root}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    try:
        until = time.monotonic() + 60
        while not catches(process.pid, signal.SIGUSR1):
            assert process.poll() is None and time.monotonic() < until
            time.sleep(0.01)
        process.send_signal(signal.SIGUSR1)
        said, _ = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 0 and "SIGUSR1 was received before the ranks were started" in said


def test_it_waits_until_the_store_is_there():
    port = free_port()

    def listen() -> None:
        time.sleep(0.5)
        with socket.create_server(("127.0.0.1", port)) as server:
            server.accept()[0].close()

    late = threading.Thread(target=listen)
    late.start()
    began = time.monotonic()
    launcher.wait_for(f"127.0.0.1:{port}", 30)
    late.join(timeout=10)
    assert 0.5 <= time.monotonic() - began < 20 and not late.is_alive()
    launcher.wait_for(f"127.0.0.1:{port}", 0)  # and then torchrun says what it does not reach

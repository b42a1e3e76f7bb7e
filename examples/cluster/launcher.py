"""torchrun as a job starts it on each node: signals are left to the ranks.

SLURM sends a signal to every process of a step, so the ranks hear it themselves: they save, stop and end with status 0.
torchrun would pass it on a second time, give them half a minute and end with a status of its own.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import time
from types import FrameType

import psutil

from engine.signals import SIGNALS, hear_no_more

WAIT = 900.0  # seconds for a first node that starts late, as on_node.sh gives them to torchrun


def leave_to_the_ranks(number: int, frame: FrameType | None) -> None:
    """Ends this process where it has started no rank yet, which would never hear of the signal."""
    if not psutil.Process().children():
        print(f"{signal.Signals(number).name} was received before the ranks were started", flush=True)
        sys.exit(0)


def wait_for(endpoint: str, seconds: float) -> None:
    """Waits until the first node's store can be reached: inside torchrun no signal is heard meanwhile."""
    host, _, port = endpoint.rpartition(":")
    until = time.monotonic() + seconds
    while time.monotonic() < until:  # and then torchrun says what it does not reach
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
            return
        except OSError:
            time.sleep(1)


def main(arguments: list[str]) -> None:
    """Runs torchrun with these arguments."""
    for number in SIGNALS:
        signal.signal(number, leave_to_the_ranks)
    if os.environ.get("SLURM_NODEID", "0") != "0":
        wait_for(arguments[arguments.index("--rdzv-endpoint") + 1], WAIT)
    # A node whose store has ended before it says so with the stack of C++, although nothing is wrong.
    level = os.environ.get("TORCH_CPP_LOG_LEVEL")
    os.environ["TORCH_CPP_LOG_LEVEL"] = level or "ERROR"
    from torch.distributed import run

    logging.getLogger("torch.distributed.elastic.rendezvous.dynamic_rendezvous").setLevel(logging.ERROR)
    if not level:
        del os.environ["TORCH_CPP_LOG_LEVEL"]  # the ranks are to warn
    run.main(["--signals-to-handle", "SIGHUP,SIGQUIT", *arguments])
    hear_no_more()


if __name__ == "__main__":
    main(sys.argv[1:])

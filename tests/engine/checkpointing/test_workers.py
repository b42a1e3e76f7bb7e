"""Work shared among forked processes: every item done once, errors as they were, nobody left behind."""

import errno
import os
import signal
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.checkpointing.workers import run_workers, share_of, worker_count


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@given(st.lists(st.integers(0, 50), max_size=40), st.integers(1, 9))
def test_every_item_falls_to_one_rank_and_shares_are_even(sizes, ranks):
    shares = [share_of(sizes, rank, ranks) for rank in range(ranks)]
    assert [number for share in shares for number in share] == list(range(len(sizes)))
    sums = [sum(sizes[number] for number in share) for share in shares]
    assert max(sums) <= sum(sizes) / ranks + max(sizes, default=0)


@pytest.mark.parametrize("count", [1, 3])
def test_results_come_in_order_and_bytes_add_up(count):
    done = []

    class Bar:
        def __enter__(self):
            return done.append

        def __exit__(self, *_):
            done.append(0)

    def work(share, advance):
        time.sleep(0.02 * (count - share))
        advance(10)
        advance(share)
        return share, os.getpid()

    results = run_workers(work, range(count), Bar)
    assert [share for share, _ in results] == list(range(count))
    assert len({pid for _, pid in results}) == count
    assert (os.getpid() in {pid for _, pid in results}) == (count == 1)
    assert sum(done) == 10 * count + sum(range(count)) and done[-1] == 0


@pytest.mark.parametrize(
    "error", [ValueError("tensor w is crooked"), OSError(errno.ENOSPC, "No space left on device", "/d/f")]
)
def test_the_first_error_is_raised_as_it_was_and_ends_the_others(tmp_path, error):
    def work(share, advance):
        (tmp_path / str(os.getpid())).touch()
        if share == 1:
            while len(list(tmp_path.iterdir())) < 3:
                time.sleep(0.01)
            raise error
        time.sleep(60)

    start = time.monotonic()
    with pytest.raises(type(error)) as caught:
        run_workers(work, range(3))
    assert time.monotonic() - start < 20
    assert (str(caught.value), caught.value.args) == (str(error), error.args)
    assert getattr(caught.value, "filename", None) == getattr(error, "filename", None)
    assert not any(alive(int(path.name)) for path in tmp_path.iterdir())


def test_a_programming_error_brings_its_traceback():
    class Local(Exception):  # which no pickle can name
        pass

    def crooked(share, advance):
        raise Local("here") if share else KeyError("there")

    with pytest.raises((RuntimeError, KeyError)) as caught:
        run_workers(crooked, [0, 0])
    assert "in crooked" in caught.value.__notes__[0]
    with pytest.raises(RuntimeError, match=r"(?s)in crooked.*Local: here"):
        run_workers(crooked, [1, 1])


@pytest.mark.parametrize(
    ("end", "message"),
    [(lambda: os.kill(os.getpid(), signal.SIGKILL), "was killed by SIGKILL"), (lambda: os._exit(3), "with status 3")],
)
def test_a_worker_that_dies_is_noticed(end, message):
    with pytest.raises(ChildProcessError, match=message):
        run_workers(lambda share, advance: end() if share else time.sleep(60), [0, 1])


def test_workers_end_with_their_parent(tmp_path):
    """Even where it was killed: their next word finds no reader."""

    def work(share, advance):
        (tmp_path / str(os.getpid())).touch()
        while True:
            time.sleep(0.01)
            advance(1)

    parent = os.fork()
    if parent == 0:
        run_workers(work, range(2))
        os._exit(1)
    while len(list(tmp_path.iterdir())) < 2:
        time.sleep(0.01)
    os.kill(parent, signal.SIGKILL)
    os.waitpid(parent, 0)
    deadline = time.monotonic() + 20
    while any(alive(int(path.name)) for path in tmp_path.iterdir()):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_the_number_of_workers():
    assert 1 <= worker_count(None) <= 8
    assert worker_count(20) == 20
    with pytest.raises(ValueError, match="--num-workers 0: give at least 1"):
        worker_count(0)

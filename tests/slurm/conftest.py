"""One cluster, one model and one undisturbed run for all tests of a session."""

from __future__ import annotations

import pytest

from engine.run_folder import RunFolder
from tests.slurm.cluster import flags, start_cluster
from tests.support.tiny import make_inputs


@pytest.fixture(scope="session")
def cluster(tmp_path_factory):
    started = start_cluster(tmp_path_factory.mktemp("slurm"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURM_CONF", started.environment["SLURM_CONF"])
        yield started
    assert started.daemons("stop").returncode == 0


@pytest.fixture(scope="session")
def inputs(tmp_path_factory, cluster):
    return make_inputs(tmp_path_factory.mktemp("inputs"), "qwen2_tied", 14)


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory, cluster, inputs):
    """A run that nothing has disturbed, and the number of its job."""
    run = RunFolder(tmp_path_factory.mktemp("undisturbed") / "run")
    job = cluster.submit(*flags(inputs, run))
    assert cluster.end_of(job) == ("COMPLETED", 0), cluster.log(job)
    return run, job

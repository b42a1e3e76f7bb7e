"""The lines of `docs/slurm.md` that stand for published launch lines: each must be one that submit takes."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from examples import lathe

ROOT = Path(__file__).resolve().parents[2]


def launch_lines() -> list[str]:
    """Every `lathe submit` line of the table."""
    page = (ROOT / "docs" / "slurm.md").read_text(encoding="utf-8")
    table = page.split("## The published launch lines, and ours\n")[1].split("\n## ")[0]
    return re.findall(r"`(lathe submit [^`]+)`", table)


def test_every_row_has_a_line():
    assert len(launch_lines()) == 7


@pytest.mark.parametrize("line", launch_lines())
def test_a_line_of_the_table_is_one_that_submit_takes(line, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("examples").symlink_to(ROOT / "examples")
    Path("publish.yaml").write_text("publish: {repo: OWNER/NAME}\n", encoding="utf-8")
    Path("FILE").write_text("HF_TOKEN=x\n", encoding="utf-8")
    words = ["2" if word == "N" else word for word in shlex.split(line)[1:]]
    words.insert(words.index("--") if "--" in words else len(words), "--dry-run")
    assert lathe.main(words) == 0
    said = capsys.readouterr().out
    named = re.search(r"--stages (\S+)", line)
    for stage in named[1].split(",") if named else ["prepare", "train", "evaluate"]:
        assert f"/slurm/{stage}.sh <==" in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["FILE", "examples", "publish.yaml"]

"""What the scripts take of a recipe's section."""

from pathlib import Path

import pytest

from checkpoint_tools.common import run_script


def averaged(steps: str, output: Path) -> None:
    """A script: it notes its flags."""
    output.write_text(steps)


@pytest.mark.parametrize("given", ["steps: null", "steps: 3\n  output: null"])
def test_a_key_without_a_value_is_no_text(tmp_path, monkeypatch, capsys, given):
    monkeypatch.chdir(tmp_path)
    Path("recipe.yaml").write_text(f"average:\n  {given}\n")
    assert run_script(averaged, ["recipe.yaml", "--output", "out"], section="average") == 2
    key = given.split()[-2].removesuffix(":")
    assert capsys.readouterr().err == f"error: recipe key average.{key} has no value; give one, or leave it out\n"
    assert not Path("out").exists()

"""Publish a Hugging Face directory on a hub, with a model card written from what the model was made of.

python checkpoint_tools/publish.py HF --repo OWNER/NAME [--private] [--branch NAME] [--run RUN]
    [--evaluation EVAL ...] [--license NAME] [--base-model OWNER/NAME] [--dry-run]
python checkpoint_tools/publish.py recipe.yaml     (what its `publish:` section says)

The access token comes from the environment (HF_TOKEN) or from the login of huggingface_hub; no flag takes one.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro

from checkpoint_tools.common import run_script
from engine.check_values import check_secrets
from engine.run_folder import RunFolder

if TYPE_CHECKING:
    from checkpoint_tools.hub.upload import Hub


def main(
    hf: tyro.conf.Positional[Path],
    repo: str,
    private: bool = False,
    branch: str = "main",
    run: Path | None = None,
    evaluation: tuple[Path, ...] = (),
    license: str = "unknown",
    base_model: str | None = None,
    dry_run: bool = False,
) -> None:
    """Publish a Hugging Face directory; an interrupted upload goes on with the same command.

    Args:
        hf: the directory, an export or an average. A README.md in it is sent as it is, in place of the card.
        repo: OWNER/NAME on the hub; made where it is not there yet.
        private: only the owner may read it.
        branch: of the repository; made where it is not there yet.
        run: the run that the model comes from, for what HF does not say itself of how it was made.
        evaluation: outputs of lathe evaluate, or RUN/evaluation; what is there of this model goes onto the card.
        license: of the model, by its name on the hub.
        base_model: OWNER/NAME of the base model, where it was a directory of another name.
        dry_run: show the card and the files, and ask nothing of the hub.
    """
    check_secrets({"repo": repo, "branch": branch, "license": license, "base_model": base_model, "hf": hf})
    publish(hf, repo, private, branch, run, evaluation, license, base_model, dry_run=dry_run)


def publish(
    hf: Path,
    repo: str,
    private: bool = False,
    branch: str = "main",
    run: Path | None = None,
    evaluation: tuple[Path, ...] = (),
    license: str = "unknown",
    base_model: str | None = None,
    *,
    dry_run: bool = False,
    hub: Hub | None = None,
) -> None:
    """Publishes as `main` does. ValueError in one sentence.

    hub: the repository, opened already by a command that has made `hf` since, and that cannot make it a second time.
    """
    from checkpoint_tools.hub.card import model_card, read_results
    from checkpoint_tools.hub.folder import CARD, check_content, open_folder
    from checkpoint_tools.hub.upload import check_name, open_hub, send

    check_name(repo, "--repo")
    if base_model is not None:
        check_name(base_model, "--base-model")
    folder = open_folder(hf)
    made_of, results = _made_of(hf, run), read_results([Path(path) for path in evaluation], hf)
    card = model_card(repo.split("/")[1], made_of, results, license=license, base_model=base_model)
    own = CARD in folder.files
    if own:
        print(f"{hf / CARD} is sent as it is; without it a card would be written")
    elif not made_of:
        print(f"{hf} does not say what it was made of: the card is nearly empty; --run RUN fills it")
    if folder.hidden:
        print(
            f"not sent, as their names begin with a dot: {', '.join(folder.hidden[:5])} ({len(folder.hidden)} in all)"
        )
    if dry_run:
        if not own:
            print(card)
        print("\n".join(f"{(hf / name).stat().st_size:>15,}  {name}" for name in folder.files))
        print(f"{len(folder.files)} files, {folder.bytes / 2**30:.2f} GiB, would go to {repo}; nothing was sent")
        return
    again = None
    if hub is not None:
        again = f"{hf} is whole: `lathe publish {hf} --repo {repo}{' --private' if hub.private else ''}`"
    hub = hub or open_hub(repo, private=private, branch=branch)
    check_content(folder, hub.token)
    print(f"publishing {len(folder.files)} files, {folder.bytes / 2**30:.2f} GiB", flush=True)
    print(f"published: {send(hub, folder, None if own else card, again)}")


def destination(repo: str | None, private: bool) -> Hub | None:
    """What --push-to-hub names, found and checked before the work whose result goes there; None without the flag."""
    if repo is None:
        if private:
            raise ValueError("--private is of the repository that --push-to-hub names: give that, or leave it out")
        return None
    check_secrets({"push_to_hub": repo})
    from checkpoint_tools.hub.upload import open_hub

    return open_hub(repo, private=private, flag="--push-to-hub")


def _made_of(hf: Path, run: Path | None) -> dict[str, Any]:
    """What the model says it was made of; what it leaves out as a run says it, which may have been trained anew since.

    ValueError where the two contradict each other.
    """
    from engine.checkpointing.provenance import complete, read_provenance
    from engine.reporting.metrics import read_metrics

    said = read_provenance(hf)
    if run is None:
        return said
    folder, number = RunFolder(run), hf.absolute().name.removeprefix("step_")
    named = [int(number)] if number.isdecimal() and folder.export(int(number)).name == hf.absolute().name else []
    steps, made = said.get("steps") or named, [line["step"] for line in read_metrics(folder.metrics)]
    if not folder.config.exists() or not made:
        raise ValueError(f"--run {run} is no run that has made a step: it has no {folder.config.name} or no metrics")
    if steps and max(steps) > max(made):
        raise ValueError(f"--run {run} has made no step {max(steps)}, of which {hf} is: give its own run")
    found = complete(read_provenance(folder.model_files), folder.config, folder.metrics, steps)
    if wrong := _contradictions(said, found):
        raise ValueError(
            f"--run {run} says otherwise than {hf} of how it was made ({', '.join(wrong)}): give its own run, or leave "
            "--run out"
        )
    return found | {name: value for name, value in said.items() if value}


def _contradictions(said: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    """What a model says of its data and course, and a run says otherwise; settings may have changed on the way."""
    trained_on = [[data.get("fingerprint") for data in one.get("data", [])] for one in (said, found)]
    wrong = ["data"] if trained_on[0] and trained_on[0] != trained_on[1] else []
    course = found["course"]
    return wrong + [f"course.{name}" for name, value in said.get("course", {}).items() if value != course.get(name)]


if __name__ == "__main__":
    sys.exit(run_script(main, sys.argv[1:], section="publish"))

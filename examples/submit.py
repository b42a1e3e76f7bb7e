"""Queues a run's workflow on a SLURM cluster: its training in a chain of jobs, and the stages before and after it.

lathe submit RECIPE [recipe.yaml ...] --nodes 64 --jobs 5 --time 4:00:00 --stages prepare,train,average,evaluate \
    [--dry-run] [-- any flag of training]

A section `submit:` of the recipe says the same. All stages work with the recipe as it was when it was submitted, flags
of training included: RUN/slurm/recipe.yaml, beside the scripts and the logs. RUN/jobs.json holds the jobs; `lathe jobs
RUN` says how they stand.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import yaml

from engine.cli import SECTIONS, dump_run, read_files
from engine.config import RunConfig
from engine.run_folder import RunFolder, replace_text
from engine.run_lock import now
from examples.cluster import checks, job_record, script, slurm, stage_checks
from examples.cluster.job_record import Job
from examples.cluster.options import SubmitOptions, read_options
from examples.cluster.stages import Key, Link, Stage, links, plan_stages, waits_for
from examples.flags import exit_status

HOME = Path(__file__).resolve().parents[1]


@dataclass(frozen=True, kw_only=True)
class Submission:
    """All that is to be queued, before anything is."""

    options: SubmitOptions
    config: RunConfig
    place: script.Place
    recipe: str  # its text
    stages: list[Stage]

    @property
    def run(self) -> RunFolder:
        return RunFolder(self.place.run)

    @property
    def queue(self) -> list[Link]:
        """The jobs in the order in which they are queued."""
        return links(self.stages)

    def text(self, stage: Stage) -> str:
        """The script of a stage."""
        ranks = self.options.nodes * self.options.ranks
        return script.script_text(self.options, self.place, stage, ranks, self.config.precision)


def read_submission(arguments: Sequence[str]) -> tuple[Submission, list[str]]:
    """What a command line asks for, checked as far as that needs no cluster; and what there is to say of it."""
    options, files, training = read_options(arguments)
    flags = [*map(str, files), *training]
    config, rates, lines = checks.read_training(flags, options)
    run = RunFolder(Path(config.output).resolve())
    place = script.Place(
        home=HOME,
        working=Path.cwd(),
        run=run.path,
        scripts=run.slurm,
        python=options.python or ("python3" if options.container else sys.executable),
        job_name=options.job_name or run.path.name,
    )
    recipe = recipe_path(run)
    sections = {name: value for name, value in read_files(files).items() if name in SECTIONS and name != "submit"}
    text = yaml.safe_dump(yaml.safe_load(dump_run(config)) | sections, sort_keys=False, allow_unicode=True)
    stages = plan_stages(options, recipe, run.path, rates)
    checks.check_paths(options, config, place)
    stage_checks.check_sections(options, config, text)
    lines += checks.plan_lines(config, text, options.nodes * options.ranks)
    return Submission(options=options, config=config, place=place, recipe=text, stages=stages), lines


def recipe_path(run: RunFolder) -> Path:
    """The recipe that all jobs read: later edits of the user's own file do not reach a chain that is queued."""
    return run.slurm / "recipe.yaml"


def show(submission: Submission, outside: Sequence[str]) -> None:
    """Prints every file that would be written, and the lines that would queue them."""
    files = {recipe_path(submission.run): submission.recipe}
    files |= {script.script_path(submission.place, stage): submission.text(stage) for stage in submission.stages}
    for path, text in files.items():
        print(f"==> {path} <==\n{text}")
    print("==> how they are queued <==")
    print("\n".join(script.sbatch_lines(submission.place, submission.queue, outside)))


def write(submission: Submission) -> None:
    """Writes the recipe and the scripts; ValueError where RUN cannot be written."""
    run = submission.run
    try:
        run.slurm.mkdir(parents=True, exist_ok=True)
        replace_text(recipe_path(run), submission.recipe)
        for stage in submission.stages:
            replace_text(script.script_path(submission.place, stage), submission.text(stage))
    except OSError as error:
        raise ValueError(f"--output {run.path}: nothing can be written in {run.slurm}: {error}") from None


def queue_all(submission: Submission, command: Sequence[str], outside: Sequence[str]) -> list[Job]:
    """Queues all jobs, and writes each down as soon as it has an id; where one is refused, none stays queued."""
    jobs: list[Job] = []
    ids: dict[Key, str] = {}
    try:
        for link in submission.queue:
            waits = waits_for(link, ids, outside)
            path = script.script_path(submission.place, link.stage)
            number = slurm.submit(path, slurm.dependency(**waits))
            ids[link.key] = number
            job = Job(
                id=number,
                stage=link.stage.name,
                number=link.number,
                of=link.stage.jobs,
                after=tuple(chain(*waits.values())),
                script=str(path),
                log=script.log_pattern(submission.place, link.stage, number),
                submitted=now(),
            )
            jobs.append(job)
            job_record.append(submission.run, command, job)
    except (ValueError, OSError, KeyboardInterrupt) as error:
        raise ValueError(f"{str(error) or 'interrupted'}{_take_back(list(ids.values()))}") from None
    return jobs


def _take_back(ids: Sequence[str]) -> str:
    """Cancels what was queued before something failed; says so."""
    try:
        slurm.cancel(ids)
        return f"; what was queued before it was cancelled: {', '.join(ids)}" if ids else ""
    except ValueError as error:
        return f"; what was queued before it is still there ({error}): scancel {' '.join(ids)}"


def submit(arguments: Sequence[str]) -> None:
    """Checks, writes and queues, or only shows; ValueError for what is wrong, before anything is queued."""
    submission, lines = read_submission(arguments)
    options, run = submission.options, submission.run
    print("\n".join(lines), end="\n" * bool(lines))
    if options.dry_run:
        show(submission, [f"JOBS-OF-{options.after.name}"] if options.after else [])
        return
    checks.refuse_queued(run)
    outside = checks.jobs_of(RunFolder(options.after)) if options.after else []
    write(submission)
    for job in queue_all(submission, ["lathe", "submit", *arguments], outside):
        of = f" {job.number} of {job.of}" if job.of > 1 else ""
        print(f"{job.id}  {job.stage}{of}{f', after {chr(44).join(job.after)}' if job.after else ''}")
    print(f"lathe jobs {shlex.quote(str(submission.config.output))} says how they stand; scripts and logs: {run.slurm}")


def main(arguments: list[str]) -> int:
    """Submits; returns the exit status. A user's mistake is one sentence."""
    return exit_status(lambda: submit(arguments))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

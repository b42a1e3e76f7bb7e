"""What a run reports while it trains: `metrics.jsonl`, TensorBoard, Weights & Biases, one line of progress.

`metrics.jsonl` is the record; everything else is a mirror of it. It holds exactly one line a step. A run
that resumes from step N first drops every later line, so that the file of an interrupted run reads like the
file of a run that was never interrupted.
"""

import json
import math
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self, TextIO

from engine.reporting.progress import ProgressLine
from engine.reporting.tracker_names import TrackerNames
from engine.run_folder import RunFolder, replace_text

# What every line holds, in this order; a caller may add fields after them.
FIELDS = (
    "step",
    "loss",
    "grad_norm",
    "lr",
    "tokens",
    "supervised_tokens",
    "padding_tokens",
    "seconds",
    "tokens_per_second",
    "supervised_tokens_per_second",
    "tflops",
    "mfu",
    "data_seconds",
    "compute_seconds",
    "save_seconds",
    "peak_device_mib",
    "peak_host_mib",
)
LEFT_OUT = "valid_left_out"  # a field of a step whose held-out loss was due when the run was told to stop
AT_START = "_at_start"  # the end of a field of the first line that was measured before that step
# Decimals of the fields that a clock or a machine's memory decides: all others, of which counts, losses and rates of
# learning keep every digit, are the same where a run is repeated.
MEASURED = {
    "seconds": 6,
    "tokens_per_second": 1,
    "supervised_tokens_per_second": 1,
    "tflops": 3,
    "mfu": 4,
    "data_seconds": 4,
    "compute_seconds": 4,
    "save_seconds": 4,
    "peak_device_mib": 0,
    "peak_host_mib": 0,
}


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The steps of a `metrics.jsonl`, in order; a half-written last line of a running job is left out.

    A missing file counts as empty. Raises `ValueError` where a line before the last is no step's JSON object.
    """
    return [step for step, _ in _steps(path)]


def rewind(path: str | Path, step: int) -> int:
    """Drop the lines of `path` that come after `step`, and a half-written last line; return how many stay.

    The file is replaced in one move, so a crash in the middle leaves the old one. Raises as `read_metrics`.
    """
    kept = [line for found, line in _steps(path) if found["step"] <= step]
    if Path(path).exists():
        replace_text(Path(path), "".join(line + "\n" for line in kept))
    return len(kept)


def lines_after(path: str | Path, step: int) -> list[str]:
    """The lines of `path` that `rewind` to `step` drops, but for one that is half-written. Raises as `read_metrics`."""
    return [line for found, line in _steps(path) if found["step"] > step]


def _steps(path: str | Path) -> Iterator[tuple[dict[str, Any], str]]:
    """Each step with its line."""
    lines = Path(path).read_text(encoding="utf-8", errors="replace").splitlines() if Path(path).exists() else []
    for number, line in enumerate(lines, start=1):
        try:
            step = json.loads(line)
            step["step"]
        except (ValueError, TypeError, KeyError):
            if number < len(lines):
                raise ValueError(f"{path}, line {number} is not a step's JSON object: {line[:80]!r}") from None
            return
        yield step, line


def _plain(value: Any) -> Any:
    """`value` as JSON knows it: one-element tensors and arrays become numbers, NaN and infinity null."""
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def _numbers(line: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """The numbers of a line with their names, those of a field by names as `field/name`."""
    for name, value in line.items():
        if isinstance(value, dict):
            yield from _numbers(value, f"{prefix}{name}/")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield f"{prefix}{name}", value


def _start_wandb(folder: RunFolder, project: str, config: dict[str, Any] | None) -> Any:
    """A Weights & Biases run; a resumed job goes on in the run whose id stands in `RUN/wandb_id`."""
    try:
        import wandb
    except ImportError:
        raise ValueError(
            f"Weights & Biases was asked for (project {project!r}) but is not installed: "
            "run `pip install wandb`, or leave it out"
        ) from None
    kept = folder.wandb_id.read_text(encoding="utf-8").strip() if folder.wandb_id.exists() else None
    name, folder_name = folder.path.name, str(folder.path)
    run = wandb.init(project=project, name=name, dir=folder_name, id=kept, resume="allow", config=config)
    folder.wandb_id.write_text(run.id, encoding="utf-8")
    # Its own counter only goes up; over our step, the repeated steps of a resume lie where they belong.
    run.define_metric("*", step_metric="step")
    return run


class MetricsLog:
    """Appends one JSON line a step to `RUN/metrics.jsonl`, mirrors it and shows progress.

    Build it on one rank only. With `start_step` N the file is first rewound to step N (0: a new run, which
    starts with an empty file). `devices` train together. `wandb` names a Weights & Biases project; it is imported
    only then. Where `stream` (standard error unless given) is no terminal, one plain line is printed every
    `progress_every` steps. Usable as a context manager. Raises `ValueError` where wandb is asked for but not
    installed, or where the existing file is not a metrics file.
    """

    def __init__(
        self,
        run_dir: str | Path,
        *,
        total_steps: int,
        start_step: int = 0,
        devices: int = 1,
        tensorboard: bool = True,
        wandb: str | None = None,
        config: dict[str, Any] | None = None,
        progress_every: int = 10,
        stream: TextIO | None = None,
    ) -> None:
        run = RunFolder(run_dir)
        run.path.mkdir(parents=True, exist_ok=True)
        self.path = run.metrics
        self.last_step = start_step
        if (kept := rewind(self.path, start_step)) < start_step:
            print(
                f"warning: {self.path} has only {kept:,} of the {start_step:,} steps before this start: the others "
                "were lost with the node that wrote them, and total_tokens does not count them",
                flush=True,
            )
        self.tracker_names = TrackerNames(read_metrics(self.path), devices)
        self.wandb = _start_wandb(run, wandb, config) if wandb else None
        self.tensorboard = None
        if tensorboard:
            # Takes seconds to import, which a run without it should not pay.
            from torch.utils.tensorboard import SummaryWriter

            # TensorBoard hides what earlier event files hold from this step on: the rewinding of its mirror. Step 0
            # holds what was measured before the first one, which a run that starts anew measures anew.
            self.tensorboard = SummaryWriter(str(run.tensorboard), purge_step=start_step + 1 if start_step else 0)
        self.file = self.path.open("a", encoding="utf-8")
        self.progress = ProgressLine(start_step, total_steps, max(1, progress_every), stream or sys.stderr)

    def write(self, step: int, *, seconds: float, tokens: int, supervised_tokens: int, **fields: Any) -> dict[str, Any]:
        """Record one step and return its line, which holds null for each of `FIELDS` that is not given.

        `tokens` are the documents' own, without padding; `seconds` is the whole step's time; `tflops` the model's
        rate per device in 1e12 operations a second; `mfu` a fraction of 1. Further fields (`valid_loss`,
        `bin_fill`, ...) follow as they are. Raises `ValueError` where `step` does not follow the last one.
        """
        if step != self.last_step + 1:
            raise ValueError(f"step {step} does not follow step {self.last_step}: one line a step, in order")
        rate = 1.0 / seconds if seconds > 0 else math.nan
        given = {"step": step, "seconds": seconds, "tokens": tokens, "supervised_tokens": supervised_tokens, **fields}
        given |= {"tokens_per_second": tokens * rate, "supervised_tokens_per_second": supervised_tokens * rate}
        line = {name: _plain(value) for name, value in (dict.fromkeys(FIELDS) | given).items()}
        for name, decimals in MEASURED.items():
            if line[name] is not None:
                line[name] = round(float(line[name]), decimals) if decimals else round(line[name])
        self.file.write(json.dumps(line, allow_nan=False) + "\n")
        self.file.flush()
        self.last_step = step
        self._mirror(line)
        self.progress.show(line)
        return line

    def sync(self) -> None:
        """Make what was written survive a power failure: a checkpoint must not outlive the lines before it."""
        os.fsync(self.file.fileno())

    def complete(self, fields: dict[str, Any]) -> None:
        """Gives the last line the held-out losses that were left out, as if they had been measured then."""
        self.file.close()
        *lines, last = (line for _, line in _steps(self.path))
        kept = {name: value for name, value in json.loads(last).items() if name != LEFT_OUT}
        lines.append(json.dumps(kept | _plain(fields), allow_nan=False))
        replace_text(self.path, "".join(line + "\n" for line in lines))
        self.file = self.path.open("a", encoding="utf-8")
        self._send(dict(_numbers(fields)), self.last_step)

    def _mirror(self, line: dict[str, Any]) -> None:
        """Send the numbers of a line to TensorBoard and Weights & Biases; what is unknown is left out.

        A field by names (`valid_losses`, `source_losses`, ...) goes as `field/name`; what was measured before the step
        goes to the step before it. Of the lists, one number a layer or an expert, only the mean and the largest
        imbalance of experts go. Some go a second time, as other trainers call them.
        """
        before = {name.removesuffix(AT_START): value for name, value in line.items() if name.endswith(AT_START)}
        if before:
            self._send(dict(_numbers(before)), line["step"] - 1)
        numbers = dict(_numbers({name: value for name, value in line.items() if not name.endswith(AT_START)}))
        numbers |= dict(_numbers(self.tracker_names.numbers(line)))
        imbalance = [value for value in line.get("expert_imbalance") or () if value is not None]
        if imbalance:
            numbers["expert_imbalance/mean"] = sum(imbalance) / len(imbalance)
            numbers["expert_imbalance/max"] = max(imbalance)
        self._send(numbers, line["step"])

    def _send(self, numbers: dict[str, float], step: int) -> None:
        if self.tensorboard is not None:
            now = time.time()
            for name, value in numbers.items():
                if name != "step":
                    self.tensorboard.add_scalar(name, value, step, walltime=now)
        if self.wandb is not None:
            self.wandb.log(numbers | {"step": step})

    def close(self) -> None:
        """Write out what the mirrors still hold and end the progress line."""
        self.progress.close()
        self.file.close()
        if self.tensorboard is not None:
            self.tensorboard.close()
        if self.wandb is not None:
            self.wandb.finish()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

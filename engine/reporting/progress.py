"""The line that shows how far a run has come: live on a terminal, plain and sparse in a log file."""

from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

# Each new step weighs a tenth in the seconds per step that the ETA is computed from.
ETA_DECAY = 0.9


def clock(seconds: float) -> str:
    """Seconds as a person reads them: `0:42`, `12:05`, `3:20:00`."""
    minutes, seconds = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


class ProgressLine:
    """One live line on a terminal; elsewhere a plain line every `every` steps, no control characters."""

    def __init__(self, start_step: int, total_steps: int, every: int, stream: TextIO) -> None:
        self.start_step, self.total_steps, self.every, self.stream = start_step, total_steps, every, stream
        self.seconds_per_step: float | None = None
        self.bar: Progress | None = None
        self.task: TaskID | None = None
        if stream.isatty():
            columns = (TextColumn("step {task.completed}/{task.total}"), BarColumn(bar_width=24))
            self.bar = Progress(*columns, TextColumn("{task.fields[text]}"), console=Console(file=stream))
            self.task = self.bar.add_task("", total=total_steps, completed=start_step, text="")
            self.bar.start()

    def eta(self, step: int) -> float:
        """Seconds that the remaining steps will take at the recent pace."""
        return (self.total_steps - step) * (self.seconds_per_step or 0.0)

    def show(self, line: dict[str, Any]) -> None:
        """Show one step; `line` is the step's line in `metrics.jsonl`."""
        step, seconds = line["step"], line["seconds"]
        if seconds is not None:
            # The first step compiles, allocates and warms caches: the second one starts the estimate anew.
            old = self.seconds_per_step
            if old is None or step == self.start_step + 2:
                old = seconds
            self.seconds_per_step = ETA_DECAY * old + (1 - ETA_DECAY) * seconds
        text = _summary(line) + f"  ETA {clock(self.eta(step))}"
        if self.bar is not None and self.task is not None:
            self.bar.update(self.task, completed=step, text=text)
        elif step % self.every == 0 or step in (self.start_step + 1, self.total_steps):
            print(f"step {step}/{self.total_steps}  {text}", file=self.stream, flush=True)

    def close(self) -> None:
        """Leave the terminal's line as it stands."""
        if self.bar is not None:
            self.bar.stop()


def _summary(line: dict[str, Any]) -> str:
    """The few numbers of a step that a person watches."""

    def number(value: float | None, pattern: str) -> str:
        return "not finite" if value is None else format(value, pattern)

    parts = [
        "no supervised tokens" if not line["supervised_tokens"] else f"loss {number(line['loss'], '.4f')}",
        f"grad norm {number(line['grad_norm'], '.3f')}",
        f"lr {number(line['lr'], '.2e')}",
    ]
    if "valid_loss" in line:
        parts.append(held_out_text(line))
    if line["tokens_per_second"] is not None:
        parts.append(f"{line['tokens_per_second']:,.0f} tokens/s")
    if line["mfu"] is not None:
        parts.append(f"MFU {line['mfu']:.1%}")
    return "  ".join(parts)


def held_out_text(line: dict[str, Any]) -> str:
    """The held-out loss of a step, and where there are several sets that of each."""

    def shown(loss: float | None) -> str:
        return "unknown" if loss is None else f"{loss:.4f}"

    sets = line.get("valid_losses") or {}
    each = ", ".join(f"{name} {shown(loss)}" for name, loss in sets.items())
    return f"held-out loss {shown(line['valid_loss'])}" + (f" ({each})" if len(sets) > 1 else "")

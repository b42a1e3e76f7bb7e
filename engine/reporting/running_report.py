"""`report.html` while a run runs: at every save, as long as that costs next to nothing, and at every end."""

import time
from collections.abc import Callable, Sequence

from engine.reporting.report import write_report
from engine.run_folder import RunFolder

SHARE = 0.01  # of a run's time that may go into its report


class RunningReport:
    """The report of a run, for the rank that logs. No error in it ends a run."""

    def __init__(self, run: RunFolder, sample: Callable[[], Sequence[tuple[str, bool]] | None]):
        """sample: returns the document that the page shows, with its mask; called once, at the first writing."""
        self._run, self._find_sample = run, sample
        self._sample: Sequence[tuple[str, bool]] | None = None
        self._found = False
        self._not_before = 0.0

    def write(self, *, always: bool = False) -> None:
        """Writes the page, or leaves it as it was written shortly before; prints what goes wrong."""
        started = time.monotonic()
        if started < self._not_before and not always:
            return
        try:
            if not self._found:
                self._found, self._sample = True, self._find_sample()
            started = time.monotonic()
            write_report(self._run.path, sample=self._sample)
        except Exception as error:  # whatever it is, the run is worth more than its report
            print(f"report.html could not be written: {type(error).__name__}: {error}", flush=True)
        self._not_before = time.monotonic() + (time.monotonic() - started) / SHARE

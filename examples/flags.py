"""What the scripts of this folder share: errors as one sentence, and a flag of one script among those of another."""

import sys
from collections.abc import Callable


def exit_status(work: Callable[[], object]) -> int:
    """Does a script's work; returns its exit status. A user's mistake is one sentence and exit status 2."""
    try:
        work()
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def take_flag(arguments: list[str], flag: str) -> tuple[str | None, list[str]]:
    """Takes `flag VALUE` or `flag=VALUE` out of the arguments; None where it is not among them."""
    for place, argument in enumerate(arguments):
        name, _, value = argument.partition("=")
        if name == flag:
            rest = arguments[:place] + arguments[place + (1 if value else 2) :]
            return value or "".join(arguments[place + 1 : place + 2]), rest
    return None, arguments

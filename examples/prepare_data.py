"""Prepares conversations for training: `prepare_data.py [mixture.yaml ...] [--flags]`, see --help."""

import sys

from data.preparation.mixture import parse_options


def main(arguments: list[str]) -> int:
    """Reads the command line and prepares; returns the exit status. A user's mistake is one sentence."""
    try:
        options = parse_options(arguments)
        from data.preparation.prepare import (
            prepare,  # the tokenizer's libraries, which no mistyped flag should wait for
        )

        prepare(options)
    except (ValueError, OSError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: run the same command again, it will continue", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

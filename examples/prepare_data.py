"""Prepares conversations for training: `python examples/prepare_data.py --help`."""

import sys

import tyro

from data.preparation.prepare import PrepareOptions, prepare


def main() -> None:
    try:
        prepare(tyro.cli(PrepareOptions))
    except (ValueError, OSError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted: run the same command again, it will continue", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()

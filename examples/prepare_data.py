"""Prepares conversations for training: `prepare_data.py [recipe.yaml | mixture.yaml ...] [--flags]`, see --help."""

import sys

from data.preparation.mixture import options_from
from data.preparation.options import PrepareOptions
from engine.cli import read_files, read_section, take_files


def read_options(arguments: list[str]) -> PrepareOptions:
    """The options of a command line: files hold them as keys, or in a section `prepare`, and flags win over files.

    Raises ValueError for a file that is wrong, or where something is missing.
    """
    files, flags = take_files(arguments)
    for file in files:
        if file.suffix not in (".yaml", ".yml"):
            raise ValueError(f"{file}: a mixture file's name ends in .yaml; name sources with --sources {file}")
    content = read_files(files)
    if "prepare" in content:
        return options_from(read_section(files, "prepare"), flags, f"{files[-1]}: prepare")
    return options_from(content, flags, str(files[-1]) if files else "")


def main(arguments: list[str]) -> int:
    """Reads the command line and prepares; returns the exit status. A user's mistake is one sentence."""
    try:
        options = read_options(arguments)
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

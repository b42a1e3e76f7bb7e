"""Evaluate a Hugging Face model on problems with known answers.

python examples/evaluate.py --model HF --data test.jsonl --output results/
python examples/evaluate.py recipe.yaml     (what its `evaluate:` section says)
python examples/evaluate.py --watch RUN --data test.jsonl     (each export of a run, as it appears)
"""

import sys
from typing import Any

import tyro

from engine.cli import is_given, merge, read_section, take_files
from examples.evaluation.options import EvaluationError, EvaluationOptions, check_options


def read_options(arguments: list[str]) -> EvaluationOptions:
    """`[recipe.yaml ...] [--flags]`, of which flags win; EvaluationError for a recipe that is wrong.

    With --watch, what the recipe says of model and output is left: it speaks of the one model at its end.
    """
    files, flags = take_files(arguments)
    try:
        section = read_section(files, "evaluate") if files else {}
        if watches := is_given("watch", flags) or "watch" in section:
            section = {name: value for name, value in section.items() if name not in ("model", "output")}
        paths: dict[str, Any] = {} if watches else {"model": tyro.MISSING, "output": tyro.MISSING}
        options = merge(EvaluationOptions(data=tyro.MISSING, **paths), section, "evaluate.")
    except ValueError as error:
        raise EvaluationError(str(error)) from error
    return tyro.cli(EvaluationOptions, args=flags, default=options, description=__doc__)


def main(arguments: list[str]) -> int:
    """Read the command line and evaluate; a user's mistake gives one sentence and the exit status 2."""
    try:
        options = read_options(arguments)
        check_options(options)
        if options.watch is not None:
            from examples.evaluation.watch import watch

            return watch(options)
        from examples.evaluation.run import evaluate  # torch and transformers, after all that needs neither
        from examples.evaluation.summary import show_in_run

        evaluate(options)
        show_in_run(options.output)
    except EvaluationError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

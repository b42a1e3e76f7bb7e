"""Evaluate a Hugging Face model on problems with known answers.

python examples/evaluate.py --model HF --data test.jsonl --output results/
python examples/evaluate.py recipe.yaml     (what its `evaluate:` section says)
"""

import sys

import tyro

from engine.cli import merge, read_section, take_files
from examples.evaluation.options import EvaluationError, EvaluationOptions, check_options


def read_options(arguments: list[str]) -> EvaluationOptions:
    """`[recipe.yaml ...] [--flags]`, of which flags win; EvaluationError for a recipe that is wrong."""
    files, flags = take_files(arguments)
    if not files:
        return tyro.cli(EvaluationOptions, args=flags, description=__doc__)
    blank = EvaluationOptions(model=tyro.MISSING, data=tyro.MISSING, output=tyro.MISSING)
    try:
        options = merge(blank, read_section(files, "evaluate"), "evaluate.")
    except ValueError as error:
        raise EvaluationError(str(error)) from error
    return tyro.cli(EvaluationOptions, args=flags, default=options, description=__doc__)


def main(arguments: list[str]) -> int:
    """Read the command line and evaluate; a user's mistake gives one sentence and the exit status 2."""
    try:
        options = read_options(arguments)
        check_options(options)
        from examples.evaluation.run import evaluate  # torch and transformers, after all that needs neither

        evaluate(options)
    except EvaluationError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

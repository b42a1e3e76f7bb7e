"""Evaluate a Hugging Face model on problems with known answers.

python examples/evaluate.py --model HF --data test.jsonl --output results/
"""

import sys

import tyro

from examples.evaluation.options import EvaluationError, EvaluationOptions
from examples.evaluation.run import evaluate


def main() -> int:
    """Read the command line and evaluate; a user's mistake gives one sentence and the exit status 2."""
    options = tyro.cli(EvaluationOptions, description=__doc__)
    try:
        evaluate(options)
    except EvaluationError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Evaluate a Hugging Face model on problems with known answers.

python examples/evaluate.py --model HF --data test.jsonl --output results/
"""

import sys

import tyro

from examples.evaluation.options import EvaluationError, EvaluationOptions, check_options


def main(arguments: list[str]) -> int:
    """Read the command line and evaluate; a user's mistake gives one sentence and the exit status 2."""
    options = tyro.cli(EvaluationOptions, args=arguments, description=__doc__)
    try:
        check_options(options)
        from examples.evaluation.run import evaluate  # torch and transformers, after all that needs neither

        evaluate(options)
    except EvaluationError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

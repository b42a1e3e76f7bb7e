"""One evaluation from its options to its result block."""

import hashlib
import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.run_folder import next_folder
from examples.evaluation.generation import Generation, choose_backend, generate, generate_vllm, make_requests
from examples.evaluation.grading import GradedQuestion, grade_questions
from examples.evaluation.options import EvaluationOptions, check_options
from examples.evaluation.prompting import Prompts, build_prompts, load_tokenizer
from examples.evaluation.questions import Question, dataset_name, load_questions
from examples.evaluation.scores import score_table
from examples.made_of import differences, named, weights_fingerprint

RULE = "=" * 60
RESULTS, GENERATIONS = "results.json", "generations.jsonl"  # what an output holds


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A model and what it is asked: all that can be known before it is loaded."""

    options: EvaluationOptions
    model: str  # as results name it
    backend: str
    questions: list[Question]
    prompts: Prompts
    made_of: dict[str, Any]


def evaluate(options: EvaluationOptions) -> dict[str, Any]:
    """Generate, grade, write `generations.jsonl` and `results.json` into `--output`, print the result block.

    Returns what `results.json` holds: `score` is pass@1 as a fraction, beside every other score and count.
    Results of the same model, questions, prompts and sampling are replaced; others are set aside.
    Raises `EvaluationError` for a user's mistake, all of them before the model is loaded.
    """
    check_options(options)
    return answer(ask(options))


def ask(options: EvaluationOptions, questions: list[Question] | None = None, called: str | None = None) -> Asked:
    """Put the questions, where they were read already these, as the model is to be asked.

    `called` is where results say that the model lies, if it is read from another place. Raises `EvaluationError`.
    """
    backend = choose_backend(options)
    questions = load_questions(options) if questions is None else questions
    tokenizer = load_tokenizer(options)
    prompts, model = build_prompts(tokenizer, questions, options), called or options.model
    made = made_of(options, model, backend, questions, prompts)
    return Asked(options=options, model=model, backend=backend, questions=questions, prompts=prompts, made_of=made)


def answer(asked: Asked) -> dict[str, Any]:
    """Load the model and evaluate it; see `evaluate`."""
    options, questions, prompts = asked.options, asked.questions, asked.prompts
    for warning in prompts.warnings:
        print(warning, file=sys.stderr)
    options.output.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    generations = _generate(prompts, options, asked.backend)
    generated = time.perf_counter()
    texts = [[generation.text for generation in samples] for samples in generations]
    golds = [question.gold for question in questions]
    graded = grade_questions(golds, texts, num_workers=max(1, min(4, os.cpu_count() or 1)))
    results = _results(asked, generations, graded)
    results["made_of"] = asked.made_of
    results["generation_seconds"] = round(generated - started, 2)
    results["grading_seconds"] = round(time.perf_counter() - generated, 2)
    set_others_aside(options.output, results["made_of"])
    _write_generations(options.output / GENERATIONS, questions, generations, graded)
    _write(options.output / RESULTS, json.dumps(results, indent=2) + "\n")
    print(result_block(results))
    return results


def _generate(prompts: Prompts, options: EvaluationOptions, backend: str) -> list[list[Generation]]:
    """All samples of every question, in the questions' order, with some lines of progress."""
    requests = make_requests(prompts, options)
    work = generate_vllm if backend == "vllm" else generate
    answers: dict[tuple[int, int], Generation] = {}
    total, shown = len(prompts.ids) * options.num_samples, 0
    for request, generations in work(prompts, options, requests):
        answers.update(zip(request.rows, generations, strict=True))
        # About ten lines in all, however many batches there are.
        if len(answers) * 10 // total > shown and len(requests) > 1:
            shown = len(answers) * 10 // total
            print(f"generated {len(answers):,} of {total:,}", file=sys.stderr, flush=True)
    return [
        [answers[question, sample] for sample in range(options.num_samples)] for question in range(len(prompts.ids))
    ]


def _results(asked: Asked, generations: list[list[Generation]], graded: list[GradedQuestion]) -> dict[str, Any]:
    """The summary that is printed and written."""
    options = asked.options
    flat = [generation for samples in generations for generation in samples]
    verdicts = [verdict for question in graded for verdict in question.verdicts]
    correct = [sum(verdict.correct for verdict in question.verdicts) for question in graded]
    scores = score_table(options.num_samples, correct, [question.majority_correct for question in graded])
    return {
        "model": asked.model,
        "model_name": Path(asked.model).name,
        "data": options.data,
        "dataset_name": dataset_name(options.data),
        "backend": asked.backend,
        "max_new_tokens": options.max_new_tokens,
        "temperature": options.temperature,
        "top_p": options.top_p,
        "top_k": options.top_k,
        "num_samples": options.num_samples,
        "seed": options.seed,
        "questions": len(graded),
        "score": scores["pass@1"],
        "scores": scores,
        "generations": len(flat),
        "generations_cut": sum(generation.cut for generation in flat),
        "generations_without_answer": sum(verdict.answer is None for verdict in verdicts),
        "gradings_timed_out": sum(verdict.timed_out for verdict in verdicts),
        "generated_tokens": sum(generation.tokens for generation in flat),
        "warnings": asked.prompts.warnings,
    }


def made_of(
    options: EvaluationOptions, model: str, backend: str, questions: list[Question], prompts: Prompts
) -> dict[str, Any]:
    """All that decides the answers and their scores, by name."""
    asked = [[question.messages, question.gold] for question in questions]
    sampling = ["max_new_tokens", "temperature", "top_p", "top_k", "num_samples", "seed", "dtype"]
    if options.temperature > 0 and backend == "transformers":
        sampling.append("batch_size")  # each batch has a seed of its own
    return {
        "model": named(model, weights_fingerprint(options.model)),
        "data": named(options.data, _digest(asked)),
        "prompts": _digest([prompts.ids, prompts.eos]),
        "backend": backend,
        **{name: getattr(options, name) for name in sampling},
    }


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, default=str).encode()).hexdigest()[:16]


def made_before(output: Path) -> dict[str, Any] | None:
    """What the results in an output were made of; None where there are none, or they do not say."""
    try:
        return dict(json.loads((output / RESULTS).read_text(encoding="utf-8"))["made_of"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def set_others_aside(output: Path, now: dict[str, Any]) -> Path | None:
    """Moves results that were made of something else to a folder `earlier.N` of the output, and says so."""
    if not (output / RESULTS).exists():
        return None
    before = made_before(output)
    found = differences(before, now) if before else ["they do not say what they were made of"]
    if not found:
        return None
    aside = next_folder(output, "earlier")
    for name in (RESULTS, GENERATIONS):
        if (output / name).exists():
            os.replace(output / name, aside / name)
    print(f"{output} held other results ({'; '.join(found)}); they were moved to {aside}", file=sys.stderr)
    return aside


def result_block(results: dict[str, Any]) -> str:
    """The results as they are printed, between two rules."""
    total, count = results["questions"], results["generations"]
    sampling = " ".join(f"{name}={results[name]}" for name in ("max_new_tokens", "temperature", "top_p", "top_k"))
    lines = [
        RULE,
        f"model_name={results['model_name']!r} dataset_name={results['dataset_name']!r}",
        sampling,
        "",
        f"metric='pass@1' num_tests_per_prompt={results['num_samples']}",
        "",
        f"score={results['score']:.4f} ({round(results['score'] * total, 4)}/{total})",
        *(f"{name}={value:.4f}" for name, value in results["scores"].items() if name != "pass@1"),
        "",
        f"cut at max_new_tokens: {results['generations_cut']:,} of {count:,}",
        f"no answer found in: {results['generations_without_answer']:,} of {count:,}",
    ]
    if results["gradings_timed_out"]:
        lines.append(f"grading ran out of time, counted as wrong: {results['gradings_timed_out']:,} of {count:,}")
    return "\n".join([*lines, RULE])


def _write_generations(
    path: Path,
    questions: list[Question],
    generations: list[list[Generation]],
    graded: list[GradedQuestion],
) -> None:
    """One line a generation, with its question, verdict and the vote of its question."""
    lines = []
    for question, samples, grades in zip(questions, generations, graded, strict=True):
        for sample, (generation, verdict) in enumerate(zip(samples, grades.verdicts, strict=True)):
            line = {
                "index": question.index,
                "sample": sample,
                "messages": question.messages,
                "generation": generation.text,
                "answer": verdict.answer,
                "expected_answer": question.gold,
                "correct": verdict.correct,
                "majority_answer": grades.majority,
                "majority_correct": grades.majority_correct,
                "tokens": generation.tokens,
                "cut": generation.cut,
                "grading_timed_out": verdict.timed_out,
            }
            lines.append(json.dumps(line, ensure_ascii=False, default=str) + "\n")
    _write(path, "".join(lines))


def _write(path: Path, text: str) -> None:
    """Write a file beside its place and move it there, so that it is whole or absent."""
    beside = path.with_name(path.name + ".new")
    beside.write_text(text, encoding="utf-8")
    os.replace(beside, path)

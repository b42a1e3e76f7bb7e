"""What an evaluation is told, and the checks of it that need no model."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from data.preparation.prompt import load_prompt
from engine.check_values import check_secrets
from engine.run_folder import RunFolder


class EvaluationError(ValueError):
    """A mistake of the user's; its text is the one sentence that is shown."""


@dataclass(frozen=True, kw_only=True)
class EvaluationOptions:
    """One evaluation on one data set, of one model or of the exports of a run."""

    model: str = ""
    """A Hugging Face directory or a hub name."""
    data: str
    """A file, a directory or a hub name (NAME, NAME:CONFIG or NAME:CONFIG:SPLIT), as --sources of prepare_data.py."""
    output: Path = Path()
    """The folder for generations.jsonl and results.json."""
    watch: Path | None = None
    """In place of --model and --output: a run, whose exports are graded as they appear, into RUN/evaluation."""
    once: bool = False
    """With --watch: grade what is there and end; else this ends when the run is done and all is graded."""
    also: tuple[Path, ...] = ()
    """With --watch: other models to grade, averages for one; each is called by the last part of its path."""
    name: str | None = None
    """With --watch: what RUN/evaluation calls these results; the name of the data set unless given."""
    split: str | None = None
    """The split of a hub data set."""
    prompt: Path | None = None
    """The prompt the model was trained with: a name in examples/prompts/, or a file of text or YAML."""
    system: str | None = None
    """A system turn of this text, instead of the row's or the template's default; "" for an empty one."""
    chat_template: Path | None = None
    """A name in examples/chat_templates/ or a .jinja file, for models that ship without a chat template."""
    answer_field: str | None = None
    """The field with the right answer, where it has another name than expected_answer, answer or solution."""
    limit: int | None = None
    """Only the first so many rows."""
    max_new_tokens: int = 2048
    """The longest answer, in tokens; how many answers reach it is reported."""
    temperature: float = 0.0
    """0 takes the likeliest token each time; above 0 answers are sampled."""
    top_p: float = 1.0
    """Sample from the likeliest tokens that together have this probability."""
    top_k: int = -1
    """Sample from so many likeliest tokens; -1 for all."""
    num_samples: int = 1
    """Answers per problem, for pass@k and maj@k."""
    seed: int = 0
    """The seed of sampling."""
    batch_size: int = 32
    """Answers generated together by one process (transformers)."""
    num_workers: int = 1
    """Processes side by side, each with its own copy of the model (transformers)."""
    backend: Literal["auto", "transformers", "vllm"] = "auto"
    """auto takes vLLM where it and a GPU are there, else transformers."""
    tensor_parallel_size: int = 1
    """GPUs of this node that hold one copy of the model together (vLLM; written, not yet run)."""
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """The precision of the weights; auto takes the model's own."""


def check_options(options: EvaluationOptions) -> None:
    """Raise `EvaluationError` for values that no evaluation can have and for paths that do not exist."""
    for name in ("max_new_tokens", "num_samples", "batch_size", "num_workers", "tensor_parallel_size"):
        if getattr(options, name) < 1:
            raise EvaluationError(f"{flag(name)} {getattr(options, name)} must be at least 1")
    if options.limit is not None and options.limit < 1:
        raise EvaluationError(f"--limit {options.limit} must be at least 1; leave it out for all rows")
    if options.temperature < 0:
        raise EvaluationError(f"--temperature {options.temperature} must be 0 (greedy) or above")
    if not 0 < options.top_p <= 1:
        raise EvaluationError(f"--top-p {options.top_p} must be above 0 and at most 1")
    if options.top_k < 1 and options.top_k != -1:
        raise EvaluationError(f"--top-k {options.top_k} must be at least 1, or -1 for all tokens")
    if options.num_samples > 1 and options.temperature == 0:
        raise EvaluationError(
            f"--num-samples {options.num_samples} would give the same greedy answer each time: "
            "add --temperature 0.7, or leave --num-samples out"
        )
    try:
        check_secrets({"model": options.model, "data": options.data})
        if options.prompt is not None:
            load_prompt(options.prompt)
    except ValueError as error:
        raise EvaluationError(str(error)) from error
    if options.watch is not None:
        _check_watch(options)
        check_heads(options.tensor_parallel_size, RunFolder(options.watch).model_files)
        return
    if options.once or options.also or options.name:
        given = "--once" if options.once else "--also" if options.also else f"--name {options.name}"
        raise EvaluationError(f"{given} belongs to --watch RUN; leave it out, or give a run to watch")
    _check_model(options.model)
    check_heads(options.tensor_parallel_size, Path(options.model))


def _check_watch(options: EvaluationOptions) -> None:
    """Refuse what cannot be watched, and models and outputs that the run decides."""
    assert options.watch is not None
    run = RunFolder(options.watch)
    if options.model or options.output != Path():
        given = f"--model {options.model}" if options.model else f"--output {options.output}"
        raise EvaluationError(
            f"{given}: with --watch it is the run that says which models are graded, and where results go; leave it "
            "out, and name other models with --also"
        )
    if not run.path.is_dir():
        raise EvaluationError(f"--watch {run.path}: there is no such folder; give the --output of a run")
    if run.is_foreign():
        raise EvaluationError(f"--watch {run.path} is a model or data and no run; grade a model with --model")
    names = [path.name for path in options.also]
    for path in options.also:
        if not path.name or names.count(path.name) > 1 or path.name.startswith("step_"):
            raise EvaluationError(
                f"--also {path}: the last part of its path is what its results are called, and must be a name that "
                "neither another model nor a step has"
            )
    if options.name is not None and options.name != folder_name(options.name):
        raise EvaluationError(f"--name {options.name} must be letters, digits, dots and dashes: a folder is called so")


def folder_name(name: str) -> str:
    """A name as a folder may be called."""
    return re.sub(r"[^\w.-]+", "_", name).strip("._") or "data"


def check_heads(size: int, model: Path) -> None:
    """Refuse a number of GPUs over which attention heads cannot be split, where the model's files say how many."""
    if size == 1 or not (model / "config.json").is_file():
        return
    heads = json.loads((model / "config.json").read_text(encoding="utf-8")).get("num_attention_heads")
    if isinstance(heads, int) and heads % size:
        good = ", ".join(str(number) for number in range(1, heads + 1) if heads % number == 0)
        raise EvaluationError(
            f"--tensor-parallel-size {size} does not divide the model's {heads} attention heads: give one of {good}"
        )


def _check_model(model: str) -> None:
    """Refuse a path that does not exist and a folder that is not a Hugging Face model."""
    path = Path(model)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise EvaluationError(
                f"--model {model} has no config.json; export a checkpoint of a run first with "
                f"checkpoint_tools/mcore_to_hf.py --checkpoint {model} --output HF"
            )
    elif path.exists():
        raise EvaluationError(f"--model {model} is a file; give the folder that holds config.json")
    elif _looks_like_path(model):
        raise EvaluationError(f"--model {model}: there is no such folder")


def _looks_like_path(name: str) -> bool:
    """Whether a name can only mean something on this machine: hub names are NAME or OWNER/NAME."""
    return name.startswith(("/", ".", "~")) or name.count("/") > 1


def flag(name: str) -> str:
    """The command-line spelling of an option."""
    return "--" + name.replace("_", "-")

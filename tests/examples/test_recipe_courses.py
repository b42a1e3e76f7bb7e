"""Every recipe from its rows to a score, at toy size: prepared, trained, averaged, exported and graded as it says."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import yaml
from safetensors.torch import load_file
from transformers import AutoTokenizer

from data.index import DocumentIndex
from engine.cli import parse_run, read_section
from engine.run_folder import RunFolder
from examples.evaluation import grading
from tests.examples.test_recipes import EXPECTED, FOLDER, ROUND_2
from tests.support import workflows
from tests.support.marks import slow
from tests.support.workflows import QUESTIONS, ROWS, write_model, write_rows, write_tokenizer

ROOT = Path(__file__).resolve().parents[2]
MATH = "Solve the following math problem. Put the answer (and only answer) inside \\boxed{}.\n\n"
TOOLS = (
    "Solve the following math problem. While you reason, you may run Python code up to {} times.\n"
    "Put the answer (and only answer) inside \\boxed{{}}.\n\n"
)
STEPS = "Think step by step and solve this problem. Give the final answer inside \\boxed{}.\n\n"

# All that a course at toy size changes beside the names of models and files, which `toy` puts in their place.
SIZES: dict[str, Any] = {
    **dict.fromkeys(("tp", "cp", "pp", "ep"), 1),
    "seq_len": 512,
    "global_batch_size": 4,
    "steps": 2,
    "epochs": None,
    "optim": {"warmup_steps": 1},
    "checkpoint": {"every": 1},
    "prepare": {"num_workers": 1},
}
LONG = 6144  # the sequence of a second round, whose solutions have 5,000 tokens
AVERAGE = {"steps": [1, 2], "num_workers": 1}
ANSWERS = {"max_new_tokens": 6, "batch_size": 8}


@dataclass(frozen=True)
class Workflow:
    """What stands for a published model and its data."""

    family: str  # of tests.support.tiny
    tokenizer: str  # of tests.support.golden
    template: bool  # whether the base model has its own, or the recipe names a chat model's tokenizer
    rows: tuple[Callable[[int], dict], ...]  # for each source
    fields: dict[str, str] | None = None  # of the last source, as the comment of the recipe says


REASONING = (workflows.cot, workflows.tir, workflows.genselect)
COLUMNS = {"tool_name": "tool", "tool_input": "tool_input", "tool_output": "tool_output"}
WORKFLOWS = {
    "openmathinstruct2": Workflow("llama", "Llama 3.1", True, (workflows.instruct,)),
    "openmathreasoning": Workflow("qwen2_untied", "Qwen2.5", True, REASONING),
    "olmo2-7b": Workflow("olmo2", "OLMo 3", False, (workflows.mixture,) * 2),
    "olmo3-7b": Workflow("olmo3", "OLMo 3", False, (workflows.mixture,) * 2),
    "tulu3-8b": Workflow("llama", "Tulu 3", False, (workflows.mixture,)),
    "tulu3-olmo2": Workflow("olmo2", "OLMo 2", False, (workflows.mixture,)),
    "numinamath-gpt-oss-120b": Workflow("gpt_oss", "Harmony", True, (workflows.numina_cot, workflows.numina_calls)),
    "numinamath-gpt-oss-20b": Workflow(
        "gpt_oss", "Harmony", True, (workflows.numina_cot, workflows.numina_columns), COLUMNS
    ),
}
FAST = ("openmathinstruct2-llama3.1-8b", "openmathreasoning-qwen2.5-math-1.5b", "numinamath-gpt-oss-20b")


def workflow(name: str) -> Workflow:
    return next(value for key, value in WORKFLOWS.items() if name.startswith(key))


def toy(name: str, folder: Path) -> Path:
    """Writes a recipe over the published one, with small files and models; its paths are those of the published one."""
    recipe, small = FOLDER / f"{name}.yaml", workflow(name)
    config, prepared = parse_run([str(recipe)]), read_section([recipe], "prepare")
    content = SIZES | {"base": str(recipe), "prepare": dict(SIZES["prepare"])}
    if name in ROUND_2:
        content["seq_len"] = LONG  # its model is what the first round made
    else:
        content["model"] = str(folder / "models" / small.family)
        if not (folder / "models" / small.family).exists():
            write_model(folder / "models" / small.family, small.family, small.tokenizer, template=small.template)
        content["prepare"]["model"] = content["model"]
    if "tokenizer" in prepared:
        content["prepare"]["tokenizer"] = str(folder / "tokenizer")
        write_tokenizer(folder / "tokenizer", small.tokenizer, template=True)
    sources = [dict(source) for source in prepared["sources"]]
    for number, (source, row) in enumerate(zip(sources, small.rows, strict=True)):
        source["data"] = str(write_rows(folder / "rows" / f"{row.__name__}_{number}.jsonl", row))
    if small.fields:
        sources[-1]["fields"] = small.fields
    content["prepare"]["sources"] = sources
    content["evaluate"] = ANSWERS | {
        "data": str(write_rows(folder / "rows" / "test.jsonl", workflows.question, QUESTIONS))
    }
    if read_section([recipe], "evaluate").get("num_samples"):
        content["evaluate"]["num_samples"] = 2
    if config.valid:
        content["valid_every"] = 1
    if name.startswith("openmathreasoning"):
        content["average"] = AVERAGE
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    return path


class KeptGrader(grading.Grader):
    """A grading process that outlives one evaluation: to start one takes seconds. It ends with its parent."""

    asking = False

    def _ask(self, kind: str, gold: str, text: str) -> Any:
        self.asking = True
        try:
            return super()._ask(kind, gold, text)
        finally:
            self.asking = False

    def close(self) -> None:
        if self.asking:  # it hangs, and the next request starts another
            super().close()


keep_grader = functools.cache(KeptGrader)


def run_course(path: Path) -> tuple[list[int], str]:
    """The commands of a recipe, one after the other in this process; their statuses and what they said."""
    from examples import lathe, pretrain_sft

    name, run = str(path), f"runs/{path.stem}"
    before = Path.cwd()
    said = io.StringIO()
    kept = mock.patch.object(grading, "Grader", keep_grader)
    alone = mock.patch("os.cpu_count", return_value=1)  # by which the evaluation chooses how many it starts
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said), kept, alone:
        os.chdir(path.parent)
        try:
            statuses = [lathe.main(["prepare", name]), pretrain_sft.main([name])]
            if path.stem.startswith("openmathreasoning"):
                statuses.append(lathe.main(["average", name]))
            else:  # recipes that average nothing export the last checkpoint; here the mean of both, to do both
                mean = ["average", "--run", run, "--steps", "1,2", "--output", f"{run}/mean", "--num-workers", "1"]
                export = ["to-hf", name, "--checkpoint", f"{run}/mean", "--num-workers", "1"]
                statuses += [lathe.main(mean), lathe.main(export)]
            statuses.append(lathe.main(["evaluate", name]))
        finally:
            os.chdir(before)
    return statuses, said.getvalue()


@pytest.fixture(scope="module")
def course(pool, tmp_path_factory):
    """The folder in which a recipe has run; a second round runs after its first. Each runs once."""
    done: dict[str, Path] = {}

    def run(name: str) -> Path:
        if name not in done:
            folder = run(name.removesuffix("-round2")) if name in ROUND_2 else tmp_path_factory.mktemp("course")
            ((statuses, said),) = pool.run(run_course, 1, toy(name, folder))
            assert not any(statuses), said
            assert "mean of 2 checkpoints (1,2), bfloat16" in said
            done[name] = folder
        return done[name]

    return run


def turns(user: str, answer: str, system: str | None = None) -> list[dict[str, Any]]:
    first = [] if system is None else [{"role": "system", "content": system}]
    return [*first, {"role": "user", "content": user}, {"role": "assistant", "content": answer}]


def expected_messages(row: dict[str, Any], kind: str) -> list[dict[str, Any]]:
    """The conversation of a made-up row, written down here without Lathe's reading of rows."""
    if kind == "instruct":
        return turns(STEPS + row["problem"], row["generated_solution"])
    if kind in ("cot", "genselect"):
        return turns((MATH if kind == "cot" else "") + row["problem"], row["generated_solution"], "")
    if kind == "tir":
        left = row["generated_solution"].partition("Remaining code executions: ")[2]
        return turns(TOOLS.format(int(left[0]) + 1 if left else 1) + row["problem"], row["generated_solution"], "")
    if kind in ("mixture", "numina_cot"):
        return row["messages"]
    arguments = {"code" if "tool_calls" in row else "input": f"print({row['problem'][7:-1]} ** 2)"}
    call = {"type": "function", "id": "call_0", "function": {"name": "python", "arguments": arguments}}
    asked, answered = turns(row["problem"], row["solution"])
    called = {"role": "assistant", "content": "", "tool_calls": [call]}
    return [asked, called, {"role": "tool", "content": row["tool_output"], "tool_call_id": "call_0"}, answered]


def documents(data: Path, tokenizer: Any) -> list[list[tuple[str, list[str]]]]:
    """For each source, in order of their texts, the documents and what of each is supervised."""
    index = DocumentIndex(data)
    found: list[list[tuple[str, list[str]]]] = [[] for _ in index.source_names]
    for number in range(len(index)):
        tokens = index.tokens(number)
        spans = [tokenizer.decode(tokens[start:end]) for start, end in index.spans(number)]
        found[index.sources[number]].append((tokenizer.decode(tokens), spans))
    return [sorted(one) for one in found]


def spoken(messages: list[dict[str, Any]], tokenizer: str, own_end: bool) -> list[str]:
    """What is supervised of a conversation: the assistant's turns with their ends."""
    said = [turn for turn in messages if turn["role"] == "assistant"]
    if tokenizer == "Harmony":
        call = " to=functions.python<|channel|>commentary json<|message|>{}<|call|>"
        return [
            call.format(json.dumps(turn["tool_calls"][0]["function"]["arguments"]))
            if "tool_calls" in turn
            else f"<|channel|>final<|message|>{turn['content']}<|return|>"
            for turn in said
        ]
    last = {"Llama 3.1": "<|eot_id|>", "Qwen2.5": "<|im_end|>"}.get(tokenizer, "<|endoftext|>")
    ends = ["<|im_end|>" if own_end else last] * (len(said) - 1) + [last]
    return [turn["content"] + end for turn, end in zip(said, ends, strict=True)]


def check_data(folder: Path, name: str) -> None:
    """Every document of every source is the text of its row, and what is supervised are its answers."""
    data, small = folder / "runs" / name / "data", workflow(name)
    meta = json.loads((data / "meta.json").read_text())
    assert meta["dropped"] == {} and [source["rows"] for source in meta["sources"]] == [ROWS] * len(small.rows)
    tokenizer = AutoTokenizer.from_pretrained(data / "tokenizer")
    template = read_section([FOLDER / f"{name}.yaml"], "prepare").get("chat_template")
    if template:
        assert tokenizer.chat_template == (ROOT / "examples/chat_templates" / f"{template}.jinja").read_text()
    found = documents(data, tokenizer)
    if name.startswith("openmathinstruct2"):
        held_out = documents(data / "valid", tokenizer)
        assert len(held_out[0]) == ROWS * 0.05 == meta["held_out"]
        found = [sorted(found[0] + held_out[0])]
    for source, row in zip(found, small.rows, strict=True):
        kept = [row(number) for number in range(ROWS) if name not in ROUND_2 or number % 20 == 0]
        conversations = [expected_messages(one, row.__name__) for one in kept]
        texts = [tokenizer.apply_chat_template(messages, tokenize=False) for messages in conversations]
        spans = [spoken(messages, small.tokenizer, own_end=template == "olmo") for messages in conversations]
        assert source == sorted(zip(texts, spans, strict=True))
    assert [source["filtered"] for source in meta["sources"]] == [ROWS - len(source) for source in found]


def check_training(folder: Path, name: str) -> None:
    """Two steps with a loss, by source where there are several, and the held-out losses that the recipe asks for."""
    run, small = RunFolder(folder / "runs" / name), workflow(name)
    lines = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2] == list(run.checkpoint_steps())
    assert all(0 < line["loss"] < math.inf and line["supervised_tokens"] > 0 for line in lines)
    assert {len(line.get("source_losses", {})) for line in lines} == {len(small.rows) if len(small.rows) > 1 else 0}
    fields = [key for key in lines[0] if key in ("valid_loss", "valid_loss_at_start")]
    assert sorted(fields) == (["valid_loss", "valid_loss_at_start"] if name.startswith("openmathinstruct2") else [])


def check_export(folder: Path, name: str) -> Path:
    """The model that is evaluated: its tensors, its positions, what it is asked through and where it stops."""
    made = folder / read_section([folder / f"{name}.yaml"], "evaluate")["model"]
    config = json.loads((made / "config.json").read_text())
    extended = "qwen2.5-math" in name
    expected = 131072 if extended else 65536 if name.startswith("olmo") else workflows.POSITIONS
    assert config["max_position_embeddings"] == expected
    if extended:
        assert config["rope_parameters"]["rope_theta"] == 500000
    first = parse_run([str(folder / f"{name.removesuffix('-round2')}.yaml")]).model
    before, after = (load_file(Path(one) / "model.safetensors") for one in (first, made))
    assert before.keys() == after.keys()
    changed = [key for key in after if not before[key].equal(after[key])]
    assert changed and all(tensor.isfinite().all() for tensor in after.values())
    meta = json.loads((folder / "runs" / name / "data" / "meta.json").read_text())
    ends = json.loads((made / "generation_config.json").read_text())["eos_token_id"]
    assert {*([ends] if isinstance(ends, int) else ends)} == {*meta["end_token_ids"]}
    assert AutoTokenizer.from_pretrained(made).chat_template == meta["chat_template"]
    return made


def check_scores(folder: Path, name: str) -> None:
    """Every question was asked as the model was trained, and every answer graded."""
    output = folder / "runs" / name / "evaluation"
    results = json.loads((output / "results.json").read_text())
    reasoning = name.startswith("openmathreasoning")
    assert (results["questions"], results["num_samples"]) == (QUESTIONS, 2 if reasoning else 1)
    assert results["temperature"] == (0.6 if reasoning else 0)
    answers = [json.loads(line) for line in (output / "generations.jsonl").read_text().splitlines()]
    prompt = STEPS if name.startswith("openmathinstruct2") else MATH
    asked = [
        turns(prompt + workflows.question(n)["problem"], "", "" if reasoning else None)[:-1] for n in range(QUESTIONS)
    ]
    assert [answer["messages"] for answer in answers] == [one for one in asked for _ in range(results["num_samples"])]
    assert {answer["expected_answer"] for answer in answers} == {str(2 * n) for n in range(QUESTIONS)}
    assert results["score"] == sum(answer["correct"] for answer in answers) / len(answers)


@pytest.mark.parametrize("name", [name if name in FAST else slow(name) for name in EXPECTED])
def test_a_recipe_runs_from_rows_to_a_score(course, name):
    folder = course(name)
    check_data(folder, name)
    check_training(folder, name)
    check_export(folder, name)
    check_scores(folder, name)


@pytest.mark.slow
def test_the_commands_as_a_user_types_them(tmp_path):
    """One recipe, its file untouched: other models, rows and sizes come as flags."""
    recipe = str(FOLDER / "openmathinstruct2-llama3.1-8b.yaml")
    model = str(write_model(tmp_path / "model", "llama", "Llama 3.1", template=True))
    rows = str(write_rows(tmp_path / "rows.jsonl", workflows.instruct))
    test = str(write_rows(tmp_path / "test.jsonl", workflows.question, QUESTIONS))

    def lathe(command: str, *flags: str) -> str:
        words = [sys.executable, str(ROOT / "examples" / "lathe.py"), command, recipe, *flags]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    lathe("prepare", "--sources", rows, "--model", model, "--tokenizer", model)
    run = tmp_path / "runs" / "openmathinstruct2-llama3.1-8b"
    meta = json.loads((run / "data" / "meta.json").read_text())
    assert (meta["documents"], meta["held_out"]) == (190, 10)  # the prompt and the part held out are the recipe's
    sizes = ("--tp", "1", "--seq-len", "512", "--global-batch-size", "4", "--steps", "2", "--epochs", "None")
    lathe("train", "--nproc", "1", "--model", model, *sizes)
    assert list(RunFolder(run).checkpoint_steps()) == [2]
    lathe("to-hf")
    printed = lathe("evaluate", "--data", test, "--max-new-tokens", "6")
    assert "model_name='final' dataset_name='test'" in printed
    generation = json.loads((run / "evaluation" / "generations.jsonl").read_text().splitlines()[0])
    assert generation["messages"] == [{"role": "user", "content": STEPS + "What is 0 + 0?"}]

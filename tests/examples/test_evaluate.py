"""Evaluation end to end: the same answers however batched or shared out; bad input gets one sentence."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from safetensors.torch import load_file, save_file

from engine.run_folder import RunFolder
from examples.evaluation import generation
from examples.evaluation.generation import Request, TransformersGenerator, make_requests
from examples.evaluation.options import EvaluationError, EvaluationOptions, check_options
from examples.evaluation.prompting import build_prompts, load_tokenizer
from examples.evaluation.questions import load_questions
from examples.evaluation.run import evaluate, result_block
from tests.support.evaluating import answering_model, write_problems, write_rows
from tests.support.marks import slow

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return answering_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def data_file(tmp_path_factory):
    return write_problems(tmp_path_factory.mktemp("data") / "problems.jsonl")


def options_for(model_dir, data, output, **changes) -> EvaluationOptions:
    values = {
        "model": str(model_dir),
        "data": str(data),
        "output": output,
        "max_new_tokens": 12,
        "batch_size": 4,
    }
    return EvaluationOptions(**{**values, **changes})


def read_generations(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "generations.jsonl").read_text().splitlines()]


def test_batches_of_unlike_prompts_answer_as_single_prompts_do(model_dir, data_file, tmp_path):
    options = options_for(model_dir, data_file, tmp_path, max_new_tokens=24, dtype="fp32")
    prompts = build_prompts(load_tokenizer(options), load_questions(options), options)
    assert len({len(ids) for ids in prompts.ids}) >= 3
    generator = TransformersGenerator(options, prompts.eos, prompts.pad)
    together = generator.answer(Request(seed=0, rows=[(i, 0) for i in range(9)], ids=prompts.ids))
    single = [generator.answer(Request(seed=0, rows=[(0, 0)], ids=[ids]))[0] for ids in prompts.ids]
    assert together == single
    assert len({generation.text for generation in single}) > 5, "the answers tell the prompts apart"


def test_an_answer_ends_at_its_end_token(model_dir, data_file, tmp_path):
    options = options_for(model_dir, data_file, tmp_path)
    generator = TransformersGenerator(options, [2, 5], pad=0)
    ended = generator._finish([40, 41, 5, 0, 0])
    assert (ended.tokens, ended.cut) == (3, False)
    assert ended.text == generator.tokenizer.decode([40, 41])
    running = generator._finish([40, 41, 0])
    assert (running.tokens, running.cut) == (3, True)


def test_the_models_own_sampling_settings_do_not_leak_into_greedy_answers(model_dir, data_file, tmp_path):
    other = tmp_path / "model"
    shutil.copytree(model_dir, other)
    settings = {
        "eos_token_id": [2],
        "pad_token_id": 0,
        "do_sample": True,
        "repetition_penalty": 1.9,
        "top_k": 3,
    }
    (other / "generation_config.json").write_text(json.dumps(settings))
    for model, output in ((model_dir, "a"), (other, "b")):
        evaluate(options_for(model, data_file, tmp_path / output, limit=4))
    texts = [[line["generation"] for line in read_generations(tmp_path / output)] for output in "ab"]
    assert texts[0] == texts[1]


@pytest.mark.parametrize("dtype", [slow("fp32"), "bf16"])
def test_results_do_not_depend_on_the_number_of_workers(model_dir, data_file, tmp_path, dtype):
    """Both files are the same to the last byte, but for the seconds that they took."""
    changes = {"temperature": 1.0, "num_samples": 3, "top_p": 0.95, "seed": 11, "dtype": dtype}
    found = []
    for workers in (1, 2, 3):
        output = tmp_path / str(workers)
        results = evaluate(options_for(model_dir, data_file, output, num_workers=workers, **changes))
        assert json.loads((output / "results.json").read_text()) == results
        assert {results.pop(f"{work}_seconds") > 0 for work in ("generation", "grading")} == {True}
        found.append((json.dumps(results), (output / "generations.jsonl").read_bytes()))
    assert found[0] == found[1] == found[2]
    assert set(results["scores"]) == {"pass@1", "pass@2", "pass@3", "maj@3"}
    generations = read_generations(output)
    assert [(line["index"], line["sample"]) for line in generations] == [(i, s) for i in range(9) for s in range(3)]
    assert len({line["generation"] for line in generations if line["index"] == 0}) == 3, "samples differ"


def test_results_of_another_making_are_set_aside_and_not_replaced(model_dir, data_file, tmp_path, capsys):
    output, moved = tmp_path / "output", tmp_path / "moved"
    first = evaluate(options_for(model_dir, data_file, output, limit=3))
    shutil.copytree(model_dir, moved)
    again = evaluate(options_for(moved, data_file, output, limit=3))  # the same weights elsewhere
    assert again["scores"] == first["scores"] and "held other results" not in capsys.readouterr().err
    assert sorted(path.name for path in output.iterdir()) == ["generations.jsonl", "results.json"]
    weights = load_file(moved / "model.safetensors")
    save_file({name: tensor * 1.01 for name, tensor in weights.items()}, moved / "model.safetensors", {"format": "pt"})
    other = evaluate(options_for(moved, data_file, output, limit=3))
    said = capsys.readouterr().err
    assert f"{output} held other results (model: {moved} [" in said and f"moved to {output / 'earlier.1'}" in said
    assert json.loads((output / "earlier.1" / "results.json").read_text()) == again
    assert len(read_generations(output / "earlier.1")) == len(read_generations(output)) == 3
    assert other["made_of"]["model"] != again["made_of"]["model"]
    evaluate(options_for(moved, data_file, output, limit=2, max_new_tokens=5))
    said = capsys.readouterr().err
    assert "data: " in said and "max_new_tokens: 12 -> 5" in said and "model: " not in said
    sampled = {"limit": 2, "max_new_tokens": 5, "temperature": 1.0}
    for size, temperature, other in ((2, 0.0, False), (4, 1.0, True), (4, 1.0, False), (2, 1.0, True)):
        evaluate(options_for(moved, data_file, output, **sampled | {"batch_size": size, "temperature": temperature}))
        assert ("held other results" in (said := capsys.readouterr().err)) == other, "sampled in other batches"
    assert "(batch_size: 4 -> 2)" in said
    shutil.rmtree(output / "earlier.4")
    shutil.rmtree(output / "earlier.3")
    (output / "results.json").write_text("{}")
    evaluate(options_for(moved, data_file, output, limit=2, max_new_tokens=5))
    assert "(they do not say what they were made of); they were moved to" in capsys.readouterr().err
    assert (output / "earlier.3" / "results.json").read_text() == "{}"


def test_the_block_reads_like_the_published_ones():
    results = {"model_name": "hf", "dataset_name": "MATH-500", "max_new_tokens": 2048, "temperature": 0.0}
    results |= {"top_p": 1.0, "top_k": -1, "num_samples": 1, "score": 0.502, "scores": {"pass@1": 0.502}}
    results |= {"questions": 500, "generations": 500, "generations_cut": 3, "generations_without_answer": 1}
    lines = result_block({**results, "gradings_timed_out": 0}).splitlines()
    assert lines[0] == lines[-1] == "=" * 60
    assert lines[1:3] == [
        "model_name='hf' dataset_name='MATH-500'",
        "max_new_tokens=2048 temperature=0.0 top_p=1.0 top_k=-1",
    ]
    assert "metric='pass@1' num_tests_per_prompt=1" in lines
    assert "score=0.5020 (251.0/500)" in lines
    assert "cut at max_new_tokens: 3 of 500" in lines
    assert "no answer found in: 1 of 500" in lines


def test_questions_and_gold_answers_of_the_usual_rows(model_dir, tmp_path):
    rows = [
        {"question": "q0", "answer": "text <<48/2=24>>\n#### 1,072"},
        {"problem": "q1", "expected_answer": 7, "solution": r"\boxed{8}"},
        {"problem": "q2", "solution": r"first \boxed{8} then \boxed{9}"},
        {"input": "q3", "answer": "plain"},
        {
            "messages": [
                {"role": "user", "content": "q4"},
                {"role": "assistant", "content": "The answer is 5."},
            ]
        },
        {
            "messages": [
                {"role": "system", "content": "s"},
                {"role": "user", "content": "u"},
                {"role": "assistant", "content": r"\boxed{1}"},
                {"role": "user", "content": "q5"},
                {"role": "assistant", "content": r"\boxed{2}"},
            ]
        },
    ]
    data = write_rows(tmp_path / "rows.jsonl", rows)
    questions = load_questions(options_for(model_dir, data, tmp_path))
    assert [question.gold for question in questions] == ["1,072", "7", "9", "plain", "5", "2"]
    assert [question.messages[-1]["content"] for question in questions] == [f"q{i}" for i in range(6)]
    assert [len(question.messages) for question in questions] == [1, 1, 1, 1, 1, 4]
    assert len(load_questions(options_for(model_dir, data, tmp_path, limit=2))) == 2
    (tmp_path / "prompt.txt").write_text("Solve: {problem}\nPut it in \\boxed{{}}.\n")
    data = write_rows(tmp_path / "named.jsonl", [{"problem": "p", "truth": "3"}])
    asked = options_for(model_dir, data, tmp_path, prompt=tmp_path / "prompt.txt", answer_field="truth")
    (question,) = load_questions(asked)
    assert question.messages == [{"role": "user", "content": "Solve: p\nPut it in \\boxed{}."}]
    assert question.gold == "3"


def test_a_system_turn_stands_in_the_place_of_the_rows_own(model_dir, data_file, tmp_path):
    own = [question.messages for question in load_questions(options_for(model_dir, data_file, tmp_path))]
    assert [len(messages) for messages in own] == [1, 1, 1, 1, 2, 1, 1, 1, 1]
    for text in ("", "Elm."):
        given = load_questions(options_for(model_dir, data_file, tmp_path, system=text))
        system = {"role": "system", "content": text}
        assert [question.messages for question in given] == [[system, messages[-1]] for messages in own]


def test_all_files_of_a_directory_are_asked(model_dir, tmp_path):
    (tmp_path / "data").mkdir()
    for number in range(3):
        row = {"problem": f"q{number}", "answer": number}
        write_rows(tmp_path / "data" / f"{number}.jsonl", [row, row])
    for limit, golds in ((None, "001122"), (3, "001"), (5, "00112")):
        questions = load_questions(options_for(model_dir, tmp_path / "data", tmp_path, limit=limit))
        assert "".join(question.gold for question in questions) == golds


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ('{"problem": "p"}', "row 2 has no right answer"),
        ('{"text": "p", "answer": "1"}', "row 2: none of messages, problem, question, input"),
        ('{"problem": "p", ', "line 2 is not JSON"),
        ("[1, 2]", "row 2 is a list"),
        ('{"messages": [{"role": "assistant", "content": "#### 1"}]}', "no turn before the last assistant"),
    ],
)
def test_a_bad_row_is_named(model_dir, tmp_path, row, sentence):
    data = tmp_path / "rows.jsonl"
    data.write_text('{"problem": "p", "answer": "1"}\n' + row + "\n")
    with pytest.raises(EvaluationError, match=sentence):
        load_questions(options_for(model_dir, data, tmp_path))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"num_samples": 4}, "--num-samples 4 would give the same greedy answer"),
        ({"temperature": -1.0}, "--temperature -1.0"),
        ({"top_p": 0.0}, "--top-p 0.0"),
        ({"batch_size": 0}, "--batch-size 0 must be at least 1"),
        ({"model": "/nowhere/hf"}, "--model /nowhere/hf: there is no such folder"),
        ({"model": str(ROOT)}, "has no config.json; export a checkpoint"),
        ({"prompt": Path("/nowhere.txt")}, "--prompt /nowhere.txt: there is no such file"),
    ],
)
def test_options_that_cannot_be_are_refused(model_dir, data_file, tmp_path, changes, sentence):
    with pytest.raises(EvaluationError, match=sentence):
        check_options(options_for(model_dir, data_file, tmp_path, **changes))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"watch": Path("/nowhere")}, "--watch /nowhere: there is no such folder; give the --output of a run"),
        ({"model": "hf"}, "--model hf: with --watch it is the run that says which models are graded"),
        ({"output": Path("out")}, "--output out: with --watch"),
        ({"also": (Path("a/x"), Path("b/x"))}, "--also a/x: the last part of its path"),
        ({"also": (Path("step_000007"),)}, "must be a name that neither another model nor a step has"),
        ({"name": "a/b"}, "--name a/b must be letters, digits, dots and dashes"),
        ({"watch": None, "once": True, "model": "hf"}, "--once belongs to --watch RUN"),
        ({"tensor_parallel_size": 0}, "--tensor-parallel-size 0 must be at least 1"),
        ({"tensor_parallel_size": 3}, "--tensor-parallel-size 3 does not divide the model's 4 attention heads"),
    ],
)
def test_what_cannot_be_watched_is_refused(tmp_path, changes, sentence):
    RunFolder(tmp_path).model_files.mkdir()
    (RunFolder(tmp_path).model_files / "config.json").write_text('{"num_attention_heads": 4}')
    with pytest.raises(EvaluationError, match=sentence.replace("?", r"\?")):
        check_options(EvaluationOptions(**{"data": "d", "watch": tmp_path, **changes}))


def test_a_turn_that_generation_does_not_end_at_is_warned_about(model_dir, data_file, tmp_path):
    other = tmp_path / "model"
    shutil.copytree(model_dir, other)
    (other / "generation_config.json").write_text('{"eos_token_id": 0}')
    for model, eos, warned in ((model_dir, [2], 0), (other, [0], 1)):
        options = options_for(model, data_file, tmp_path)
        prompts = build_prompts(load_tokenizer(options), load_questions(options), options)
        assert (prompts.eos, len(prompts.warnings)) == (eos, warned)
    assert "'<|im_end|>' (2), but generation stops only at [0]" in prompts.warnings[0]


def test_requests_hold_every_sample_once_in_batches_of_like_length(model_dir, data_file, tmp_path):
    options = options_for(model_dir, data_file, tmp_path, temperature=1.0, num_samples=2)
    prompts = build_prompts(load_tokenizer(options), load_questions(options), options)
    requests = make_requests(prompts, options)
    rows = [row for request in requests for row in request.rows]
    assert sorted(rows) == [(question, sample) for question in range(9) for sample in range(2)]
    assert [len(request.rows) for request in requests] == [4, 4, 4, 4, 2]
    lengths = [len(ids) for request in requests for ids in request.ids]
    assert lengths == sorted(lengths, reverse=True)
    others = make_requests(prompts, replace(options, seed=1))
    assert len({request.seed for request in requests + others}) == 10


def test_a_users_mistake_gives_one_sentence_and_status_2(model_dir, data_file, tmp_path):
    command = [sys.executable, str(ROOT / "examples" / "evaluate.py"), "--model", str(model_dir)]
    command += ["--output", str(tmp_path / "out")]
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "HF_HUB_OFFLINE": "1"}
    run = subprocess.run(
        [*command, "--data", "/nowhere.jsonl"], capture_output=True, text=True, env=environment, check=False
    )
    assert run.returncode == 2
    assert run.stderr.strip().splitlines()[-1] == "error: --data /nowhere.jsonl: there is no such file"
    assert "Traceback" not in run.stderr
    assert not (tmp_path / "out").exists()


def test_weights_that_cannot_be_loaded_get_a_sentence(model_dir, data_file, tmp_path):
    broken = tmp_path / "model"
    shutil.copytree(model_dir, broken)
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5_000])
    with pytest.raises(EvaluationError, match="its weights cannot be loaded"):
        evaluate(options_for(broken, data_file, tmp_path / "out", limit=2))


def test_no_chat_template_is_refused_and_one_can_be_given(model_dir, data_file, tmp_path):
    bare = tmp_path / "model"
    shutil.copytree(model_dir, bare)
    (bare / "chat_template.jinja").unlink()
    with pytest.raises(EvaluationError, match="has no chat template; give one with --chat-template"):
        load_tokenizer(options_for(bare, data_file, tmp_path))
    options = options_for(bare, data_file, tmp_path, chat_template=model_dir / "chat_template.jinja")
    given = build_prompts(load_tokenizer(options), load_questions(options), options)
    options = options_for(model_dir, data_file, tmp_path)
    assert given.ids == build_prompts(load_tokenizer(options), load_questions(options), options).ids
    ours = load_tokenizer(options_for(bare, data_file, tmp_path, chat_template=Path("chatml"))).chat_template
    assert ours == (ROOT / "examples" / "chat_templates" / "chatml.jinja").read_text()
    with pytest.raises(EvaluationError, match=r"--chat-template chatnl: there is no such file, and no template"):
        load_tokenizer(options_for(bare, data_file, tmp_path, chat_template=Path("chatnl")))


def test_several_gpus_are_vllms(monkeypatch):
    def chosen(**changes) -> str:
        return generation.choose_backend(EvaluationOptions(data="d", **changes))

    monkeypatch.setattr(generation, "find_spec", lambda name: None)
    with pytest.raises(EvaluationError, match=r"--tensor-parallel-size 2 is vLLM's \(not installed\): leave it out"):
        chosen(tensor_parallel_size=2)
    monkeypatch.setattr(generation, "find_spec", lambda name: name)
    for changes in ({"backend": "transformers"}, {"num_workers": 2}):
        with pytest.raises(EvaluationError, match=r"is vLLM's \(installed\): leave it out, or --backend transformers"):
            chosen(tensor_parallel_size=2, **changes)
    monkeypatch.setattr(generation.torch.cuda, "device_count", lambda: 2)
    with pytest.raises(EvaluationError, match=r"--tensor-parallel-size 4: this node has 2 GPU\(s\)"):
        chosen(tensor_parallel_size=4)
    assert chosen(tensor_parallel_size=2) == chosen(backend="vllm") == "vllm"
    assert chosen(num_workers=2) == chosen(backend="transformers") == "transformers"


def test_vllm_is_told_over_how_many_gpus(monkeypatch):
    """A stand-in of its engine, which answers each prompt with its own length; vLLM itself was not run yet."""
    told = {}

    class LLM:
        def __init__(self, **options):
            told.update(options, seeds=[])

        def generate(self, prompts, params):
            told["seeds"].append([one["seed"] for one in params])
            ids = [prompt["prompt_token_ids"] for prompt in prompts]
            best = [SimpleNamespace(text=str(len(one)), token_ids=one, finish_reason="stop") for one in ids]
            return [SimpleNamespace(outputs=[one]) for one in best]

    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(LLM=LLM, SamplingParams=lambda **options: options))
    options = EvaluationOptions(data="d", model="hf", tensor_parallel_size=4)
    requests = [
        generation.Request(seed=1, rows=[(0, 0)], ids=[[7]]),
        generation.Request(seed=2, rows=[(1, 0)], ids=[[7, 8]]),
    ]
    found = list(generation.generate_vllm(SimpleNamespace(eos=[2]), options, requests))
    assert [[one.text for one in answers] for _, answers in found] == [["1"], ["2"]]
    assert (told["tensor_parallel_size"], told["model"]) == (4, "hf")
    seeds = told["seeds"]
    together = [generation.Request(seed=3, rows=[(0, 0), (1, 0)], ids=[[7], [7, 8]])]
    assert list(generation.generate_vllm(SimpleNamespace(eos=[2]), options, together))
    assert told["seeds"] == seeds and len(set(*seeds)) == 2, "the batches that were asked for change nothing"

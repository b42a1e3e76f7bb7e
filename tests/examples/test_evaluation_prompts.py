"""A model is asked with the prompts that it was trained with: by name or file, with all that they may hold."""

import json
from pathlib import Path

import pytest

from data.preparation import prompt as prompts
from data.preparation.formats import RowReader
from examples.evaluation.options import EvaluationError, EvaluationOptions, check_options
from examples.evaluation.questions import load_questions

ROW = {"question": "2+2?", "answer": "4"}


@pytest.fixture
def asked(tmp_path, monkeypatch):
    """The messages of one question under a prompt of this text."""
    monkeypatch.setattr(prompts, "PROMPTS", tmp_path / "prompts")
    (tmp_path / "prompts").mkdir()
    (tmp_path / "rows.jsonl").write_text(json.dumps(ROW))
    (tmp_path / "config.json").write_text("{}")

    def ask(text: str, prompt: str, file: str = "prompts/math.txt") -> list[dict]:
        (tmp_path / file).write_text(text)
        data, model = str(tmp_path / "rows.jsonl"), str(tmp_path)
        options = EvaluationOptions(model=model, data=data, output=tmp_path / "out", prompt=Path(prompt))
        check_options(options)
        (question,) = load_questions(options)
        return question.messages

    return ask


@pytest.mark.parametrize(
    "text",
    ["Q: {}", "Q: {problem}", "system: ''\nuser: 'Q: {}'\n", "user: '{}'\nexamples: [{user: a, assistant: '{b}'}]\n"],
)
def test_training_and_evaluation_ask_alike(asked, tmp_path, text):
    file = "prompts/math.yaml" if "user" in text else "prompts/math.txt"
    messages = asked(text, "math", file)
    assert messages == asked(text, str(tmp_path / file), file)  # by name and by path
    trained = RowReader(prompt=prompts.load_prompt("math"))(ROW)
    assert trained.messages == [*messages, {"role": "assistant", "content": "4"}]
    assert "2+2?" in messages[-1]["content"] and len(messages) == 1 + 2 * ("examples" in text) + ("system" in text)


@pytest.mark.parametrize(
    ("text", "prompt", "sentence"),
    [
        ("Solve it.", "math", "math.txt names no field: write {} or {problem} where"),
        ("{}", "maths", "--prompt maths: there is no such file, and no prompt of this name (did you mean math?)"),
        ("{level}", "math", "row 1: the prompt asks for {level}, the row has question, answer"),
    ],
)
def test_prompts_that_are_refused(asked, text, prompt, sentence):
    with pytest.raises(EvaluationError) as refused:
        asked(text, prompt)
    assert sentence in str(refused.value)

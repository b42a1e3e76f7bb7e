"""Prompts: what they fill, what they leave as it is, and what they are refused for before any row is read."""

import pytest

from data.preparation import prompt as prompts
from data.preparation.conversation import RowError
from data.preparation.formats import Fields, RowReader
from data.preparation.prompt import Prompt, load_prompt, total_code_executions

ROW = {"problem": "2+2?", "generated_solution": "4"}


def user(content: str) -> dict:
    return {"role": "user", "content": content}


@pytest.fixture
def written(tmp_path):
    """Writes a prompt file and returns its path."""

    def write(text: str | bytes, name: str = "prompt.txt"):
        (tmp_path / name).write_bytes(text.encode() if isinstance(text, str) else text)
        return tmp_path / name

    return write


@pytest.mark.parametrize(
    ("text", "content"),
    [
        ("Answer in \\boxed{}, set {{x}}: {problem} ({level})\n\n", "Answer in \\boxed{}, set {x}: a{b}? (3)"),
        ("Put it inside \\boxed{{}}.\n\n{}", "Put it inside \\boxed{}.\n\na{b}?"),
        ("\\frac{}{} and \\text*{}: {}\r\n", "\\frac{}{} and \\text*{}: a{b}?"),
        ("{{}} {{{problem}}} {question}", "{} {a{b}?} a{b}?"),
        ("\ufeff{input}", "a{b}?"),
        ("{} is of level {level}", "a{b}? is of level 3"),
    ],
)
def test_fields_are_filled_and_other_braces_kept(written, text, content):
    row = {"problem": "a{b}?", "level": 3, "solution": "4"}
    prompt = load_prompt(written(text))
    assert prompt.messages(row) == [user(content)]
    conversation = RowReader(prompt=prompt)(row)
    assert conversation.messages == [user(content), {"role": "assistant", "content": "4"}]
    assert conversation.unused == (() if "level" in prompt.fields else ("level",))


def test_the_question_has_the_name_it_is_given():
    row = {"prompt": "2+2?", "completion": "4", "problem": "no"}
    fields = Fields(question="prompt", answer="completion")
    for text in ("Q: {}", "Q: {question}"):
        assert Prompt(text).messages(row, "prompt") == [user("Q: 2+2?")]
        assert RowReader(prompt=Prompt(text), fields=fields)(row).messages[0] == user("Q: 2+2?")
    with pytest.raises(RowError, match="column not used: prompt holds the question"):
        RowReader(prompt=Prompt("Q: {problem}"), fields=fields)(row)


def test_a_prompt_may_name_every_column_of_the_question():
    row = {"passage": "Sky.", "query": "Colour?", "reply": "Blue.", "id": 1}
    conversation = RowReader(prompt=Prompt("{passage} {query}"), fields=Fields(answer="reply"))(row)
    assert conversation.messages == [user("Sky. Colour?"), {"role": "assistant", "content": "Blue."}]
    assert conversation.unused == ("id",)
    with pytest.raises(RowError, match="missing prompt field: the prompt asks for {}, the row has passage"):
        RowReader(prompt=Prompt("{}"), fields=Fields(answer="reply"))(row)


def test_a_prompt_in_yaml_with_system_and_examples(written):
    text = (
        "system: You have {total_code_executions} runs.\nuser: |-\n  Q: {question}\n"
        "examples:\n- {user: '1+1?', assistant: '{2}'}\n- {user: 'x', assistant: 'y'}\n"
    )
    prompt = load_prompt(written(text, "prompt.yaml"))
    row = {"problem": "2+2?", "generated_solution": "... Remaining code executions: 11 ... executions: 10"}
    turns = [
        {"role": "system", "content": "You have 12 runs."},
        user("1+1?"),
        {"role": "assistant", "content": "{2}"},
        user("x"),
        {"role": "assistant", "content": "y"},
        user("Q: 2+2?"),  # the question under another of its names
    ]
    assert prompt.messages(row) == turns
    conversation = RowReader(prompt=prompt)(row)
    assert conversation.messages == [*turns, {"role": "assistant", "content": row["generated_solution"]}]
    assert conversation.untrained == {2, 4}
    again = {"user": prompt.user, "system": prompt.system}
    assert load_prompt(again | {"examples": [{"user": a, "assistant": b} for a, b in prompt.examples]}) == prompt
    assert load_prompt(prompt) is prompt


def test_an_empty_system_turn_is_a_turn(written):
    prompt = load_prompt(written('system: ""\nuser: "{problem}"\n', "p.yml"))
    for reader in (RowReader(prompt=prompt), RowReader(prompt=prompt, system=""), RowReader(system="")):
        assert reader(ROW).messages[:2] == [{"role": "system", "content": ""}, user("2+2?")]
    assert load_prompt({"user": "{}", "system": None}) == Prompt("{}")
    with pytest.raises(ValueError, match="--system 'Be brief.': the prompt has another, ''"):
        RowReader(prompt=prompt, system="Be brief.")


def test_executions_are_counted_in_the_answer_that_is_taken():
    row = {"problem": "p", "output": "no code", "reply": "Remaining code executions: 3"}
    reader = RowReader(prompt=Prompt("{problem} {total_code_executions}"), fields=Fields(answer="reply"))
    assert reader(row).messages[0] == user("p 4")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.txt", "Solve this problem.", "p.txt names no field: write {} or {problem}"),
        ("p.txt", "Only \\boxed{} and {{braces}}.", "names no field"),
        ("p.txt", "In {total_code_executions} runs", "names no field"),
        ("p.txt", "{} and {}", "p.txt has {} 2 times, and it is the question: keep one, write {{}} where"),
        ("p.txt", "{problem} or {}", "p.txt has {} and {problem}, and both are the question"),
        ("p.txt", " \n", "the file is empty"),
        ("p.txt", b"caf\xe9 {}", "p.txt: not UTF-8 at byte 3"),
        ("p.yaml", b"user: '{} caf\xe9'", "p.yaml: not UTF-8 at byte 13"),
        ("p.yaml", "user: Solve this.", "p.yaml names no field"),
        ("p.yaml", "system: '{}'\nuser: '{input}'", "has {} and {input}"),
        ("p.yaml", "other: a\n", "and no others"),
        ("p.yaml", "user: '{}'\nfew_shot: []\n", "and no others"),
        ("p.yaml", "user: 3\n", "must be text"),
        ("p.yaml", "user: [", "not YAML"),
        ("p.yaml", "- {}", "has the key `user`"),
        ("p.yaml", "user: '{}'\nexamples: [{user: a}]", "`examples` must be a list of {user, assistant}"),
        ("p.yaml", "user: '{}'\nexamples: [{user: a, assistant: 3}]", "`examples` must be a list"),
    ],
)
def test_prompts_that_are_refused(written, name, content, message):
    with pytest.raises(ValueError) as refused:
        load_prompt(written(content, name))
    assert message in str(refused.value) and str(refused.value).startswith(f"--prompt {written(content, name)}")


def test_mappings_are_held_to_the_same():
    for mapping in ({"user": "no field"}, {"system": "{}"}, {"user": "{}", "examples": {"user": "a"}}):
        with pytest.raises(ValueError, match="^prompt"):
            load_prompt(mapping)
    with pytest.raises(ValueError, match="prompt names no field"):
        load_prompt(Prompt("no field"))


def test_prompts_go_by_name(monkeypatch, written, tmp_path):
    monkeypatch.setattr(prompts, "PROMPTS", tmp_path)
    written("M {}", "math.txt")
    written("user: 'T {}'", "tir.yaml")
    written("of the folder", "README.md")
    assert load_prompt("math") == load_prompt("math.txt") == Prompt("M {}")
    assert load_prompt("tir") == Prompt("T {}")
    with pytest.raises(ValueError) as refused:
        load_prompt("maths")
    assert str(refused.value) == (
        "--prompt maths: there is no such file, and no prompt of this name (did you mean math?); known are math, tir"
    )
    with pytest.raises(ValueError, match="--prompt Solve this. Solve .*: there is no such file"):
        load_prompt("Solve this. " * 100)
    monkeypatch.chdir(tmp_path)
    written("own {}", "math")  # a file that one names is meant
    assert load_prompt("math") == Prompt("own {}")


def test_a_field_that_a_row_lacks_is_named():
    with pytest.raises(ValueError, match=r"asks for \{level\}, the row has problem, levels \(did you mean levels\?\)"):
        Prompt("{level}").messages({"problem": "a", "levels": "b"})
    with pytest.raises(RowError, match="missing prompt field"):
        RowReader(prompt=Prompt("{problem} {level}"))(ROW)
    for value in ([], ["a"], {"a": 1}):
        with pytest.raises(
            RowError, match="missing prompt field: {level} of the prompt is of type .*: text or a number"
        ):
            RowReader(prompt=Prompt("{problem} {level}"))(ROW | {"level": value})
    with pytest.raises(RowError, match="{} of the prompt is of type list"):
        RowReader(prompt=Prompt("Solve: {}"))({"question": ["a", None], "answer": "b"})


def test_a_prompt_takes_no_blank_question():
    for text in ("Solve: {}", "Solve: {problem}"):
        with pytest.raises(RowError, match="empty text: problem is empty"):
            RowReader(prompt=Prompt(text))({"problem": " \n", "solution": "4"})
    beside = RowReader(prompt=Prompt("Solve: {passage}"))({"problem": "", "passage": "2+2", "solution": "4"})
    assert beside.messages[0]["content"] == "Solve: 2+2"


def test_a_prompt_takes_no_messages():
    row = {"messages": [user("a"), {"role": "assistant", "content": "b"}]}
    with pytest.raises(RowError, match="unknown fields: --prompt or .* asks for a question and an answer"):
        RowReader(prompt=Prompt("{}"))(row)
    conversation = RowReader(prompt=Prompt("Q {}"))(ROW | row)
    assert conversation.messages[0] == user("Q 2+2?") and conversation.unused == ("messages",)


@pytest.mark.parametrize(
    ("output", "executions"),
    [
        ("Remaining code executions: 7\n ... Remaining code executions: 6", 8),
        ("Remaining code executions: 15.", 16),
        ("You have run out of code executions!", 1),
        ("no code at all", None),
    ],
)
def test_total_code_executions(output, executions):
    assert total_code_executions({"output": output}) == executions

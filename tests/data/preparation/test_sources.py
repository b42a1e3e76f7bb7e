"""Sources and options: what the command line and mixture files say, and what of it is refused."""

import dataclasses

import pytest
import yaml

from data.preparation.formats import Fields
from data.preparation.mixture import options_from
from data.preparation.options import PrepareOptions
from data.preparation.prompt import Prompt
from data.preparation.sources import Source, parse_source
from examples.prepare_data import read_options

MIXTURE = """
model: some/model
hold_out: 0.1
template-args: {enable_thinking: false}
where: len(answer) > 3
sources:
  - data: org/Set::cot
    take: 2.0
    prompt: {system: "", user: "Solve {problem}"}
    system: ""
    fields: {question: problem, answer: generated_solution}
    where: ["float(rate) <= 0.3"]
    limit: 1000
    hold_out: 500
  - more/train.jsonl.gz:20
  - {data: more/train.jsonl, take: 5}
"""


@pytest.mark.parametrize(
    ("text", "data", "take"),
    [
        ("a.jsonl", "a.jsonl", 1.0),
        ("a.jsonl:0.5", "a.jsonl", 0.5),
        ("a.jsonl:3.0", "a.jsonl", 3.0),
        ("a.jsonl:2000", "a.jsonl", 2000),
        ("org/set:config:train:.25", "org/set:config:train", 0.25),
        ("org/set:config:train", "org/set:config:train", 1.0),
        ("org/set::3", "org/set:", 3),
        ("dir/*.jsonl:1e3", "dir/*.jsonl:1e3", 1.0),
    ],
)
def test_a_number_behind_the_last_colon_is_the_part_to_take(text, data, take):
    source = parse_source(text)
    assert (source.data, source.take, type(source.take)) == (data, take, type(take))


def test_a_file_whose_name_ends_like_a_part_is_the_file(tmp_path):
    (tmp_path / "a:2").write_text("{}")
    assert parse_source(f"{tmp_path}/a:2") == Source(data=f"{tmp_path}/a:2")
    assert parse_source(f"{tmp_path}/a:2:7") == Source(data=f"{tmp_path}/a:2", take=7)


def test_sources_have_names_of_their_own():
    given = ("x/train.jsonl", "y/train.jsonl.gz", "org/Set-v1.5:cfg:train", "some/folder/*.jsonl", "some/folder/")
    given += (Source(data="z/train.parquet", name="train-2"), Source(data="u.jsonl", name="my set"))
    names = [source.name for source in PrepareOptions(sources=given).each_source()]
    assert names == ["train", "train-3", "Set-v1.5-cfg-train", "folder", "folder-2", "train-2", "my set"]
    twice = (Source(data="a", name="one"), Source(data="b", name="one"))
    with pytest.raises(ValueError, match="two sources have the name one"):
        PrepareOptions(sources=twice)


def test_a_source_inherits_what_it_does_not_say(tmp_path):
    (tmp_path / "mixture.yaml").write_text(MIXTURE)
    flags = ["--output", "out", "--prompt", "math", "--system", "Be brief.", "--limit", "7", "--ignore-columns", "id"]
    options = read_options([str(tmp_path / "mixture.yaml"), *flags])
    first, second, third = options.each_source()
    assert options.template_args == {"enable_thinking": False} and options.hold_out == 0.1
    assert (first.prompt, first.system) == (Prompt(user="Solve {problem}", system=""), "")
    assert first.fields == Fields(question="problem", answer="generated_solution")
    assert (first.where, first.limit, first.hold_out, first.take) == (("float(rate) <= 0.3",), 1000, 500, 2.0)
    assert (second.data, second.take, second.name) == ("more/train.jsonl.gz", 20, "train")
    assert (second.prompt, second.system, second.fields) == ("math", "Be brief.", Fields())
    assert (second.where, second.limit, second.hold_out) == (("len(answer) > 3",), 7, None)
    assert (third.data, third.take, third.name) == ("more/train.jsonl", 5, "train-2")
    assert {source.ignore_columns for source in (first, second, third)} == {("id",)}


def test_later_files_win_and_flags_win_over_files(tmp_path):
    (tmp_path / "one.yaml").write_text("model: m\nseed: 1\nlimit: 5\nsources: a.jsonl\noutput: out\ntrain_on: last\n")
    (tmp_path / "two.yaml").write_text("seed: 2\nsources: [b.jsonl, c.jsonl]\n")
    files = [str(tmp_path / "one.yaml"), str(tmp_path / "two.yaml")]
    options = read_options([*files, "--limit", "6", "--template-args", "a=null", "b=1", "c=x=y", "d="])
    assert (options.seed, options.limit, options.train_on) == (2, 6, "last")
    assert [source.data for source in options.each_source()] == ["b.jsonl", "c.jsonl"]
    assert options.template_args == {"a": None, "b": 1, "c": "x=y", "d": ""}
    options = read_options([*files, "--sources", "d.jsonl:0.5"])
    assert [(source.data, source.take) for source in options.each_source()] == [("d.jsonl", 0.5)]
    assert options_from(yaml.safe_load((tmp_path / "one.yaml").read_text()), ["--seed", "3"]).seed == 3


def test_every_field_of_a_source_is_a_key(tmp_path):
    given = {
        "data": "a.jsonl", "name": "n", "take": 0.5, "format": "question_answer", "fields": {"question": "q"},
        "prompt": "math", "system": "s", "ignore_columns": ["id"], "where": ["True"], "limit": 3, "hold_out": 0.25,
        "config": "c", "split": "train",
    }  # fmt: skip
    assert set(given) == {field.name for field in dataclasses.fields(Source)}
    (source,) = options_from({"sources": [given], "model": "m", "output": "o"}, []).sources
    assert source == Source(**{**given, "fields": Fields(question="q"), "ignore_columns": ("id",), "where": ("True",)})


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        ({"sorces": "a"}, "unknown key sorces; the nearest is sources"),
        ({"sources": [{"data": "a", "promt": "x"}]}, r"sources\[0\]: unknown key promt; the nearest is prompt"),
        ({"sources": [{"data": "a", "chat_template": "x"}]}, r"sources\[0\]: chat_template counts for all sources"),
        ({"sources": ["b", {"take": 1}]}, r"sources\[1\]: data is missing"),
        ({"sources": [{"data": "a", "take": "half"}]}, "take is 'half'; it takes a whole number or a number"),
        ({"sources": [{"data": "a", "take": 0}]}, "a:0: take a share or a count above 0"),
        ({"sources": [{"data": "a", "take": float("inf")}]}, "a:inf: take a share or a count above 0"),
        ({"sources": [{"data": "a", "take": float("nan")}]}, "a:nan: take a share or a count above 0"),
        ({"sources": [{"data": "a", "hold_out": float("nan")}]}, "hold_out nan: hold out a share in"),
        ({"template_args": {"messages": 1}}, "--template-args messages: it is made from each row: leave it out"),
        ({"sources": ["a:0.0"]}, "a:0.0: take a share or a count above 0"),
        ({"sources": [{"data": "a", "hold_out": 1.0}]}, "hold_out 1.0: hold out a share in"),
        ({"sources": [{"data": "a", "prompt": {"user": "no field"}}]}, "prompt names no field"),
        ({"sources": ["a"], "fields": {"questio": "x"}}, "fields: unknown key questio; the nearest is question"),
        ({"limit": 1.5}, "limit is 1.5; it takes a whole number"),
        ({"limit": 0}, "--limit at least 1"),
        ({"seed": None}, "seed has no value: leave it out for its default"),
        ({"strict": "yes"}, "strict is 'yes'; it takes true or false"),
        ({"chat_template": True}, "chat_template is True; it takes text"),
        ({"dedup": "text"}, "dedup is 'text'; it takes none, prompt, conversation"),
        ({"format": "chat"}, "--format chat: choose one of auto, messages"),
        ({"hold_out": -1}, "--hold-out -1: hold out a share"),
        ({"hold_out": 5, "hold_out_fraction": 0.1}, "is given instead of --hold-out"),
        ({"seed": -1}, "--seed -1 must be at least 0"),
        ({"max_length": 1}, "--max-length 1 must be at least 2"),
        ({"where": "len("}, "--where len"),
        (["a.jsonl"], "keys with values are needed"),
        ({"model": "m", "output": "o"}, "--sources: name at least one"),
        ({"sources": "a", "output": "o"}, "--model: name the model"),
        ({"sources": "a", "model": "m"}, "--output: name the data directory to make"),
    ],
)
def test_what_cannot_be_is_refused_in_one_sentence(mapping, message):
    with pytest.raises(ValueError, match=message) as found:
        options_from(mapping, [], "mixture.yaml")
    assert "\n" not in str(found.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"model: caf\xe9\n", r"mixture.yaml is not UTF-8 \(byte 10\)"),
        (b"model: [\n", "mixture.yaml is not YAML"),
        (b"modle: m\n", "mixture.yaml: unknown key modle; the nearest is model"),
        (None, "mixture.yaml: there is no such file"),
    ],
)
def test_a_mixture_file_that_is_wrong_is_named(tmp_path, content, message):
    if content is not None:
        (tmp_path / "mixture.yaml").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_options([str(tmp_path / "mixture.yaml"), "--output", "out"])


def test_what_is_no_mixture_file_is_a_source():
    with pytest.raises(ValueError, match=r"^a.jsonl: a mixture file's name ends in .yaml; name sources with --sources"):
        read_options(["a.jsonl", "--model", "m"])


def test_template_arguments_are_pairs():
    with pytest.raises(ValueError, match="--template-args thinking: write name=value"):
        read_options(["--sources", "a", "--model", "m", "--output", "o", "--template-args", "thinking"])
    with pytest.raises(ValueError, match=r"--template-args x=\[1: the value is no YAML: quote it if it is text"):
        read_options(["--sources", "a", "--model", "m", "--output", "o", "--template-args", "x=[1"])


def test_an_amount_behind_the_data_of_a_mixture_names_its_key():
    with pytest.raises(ValueError, match="x.jsonl:2: in a file an amount is a key of its own, `take: 2`"):
        Source(data="x.jsonl:2")

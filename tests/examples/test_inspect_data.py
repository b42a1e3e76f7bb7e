"""`inspect_data.py`: which documents and dropped rows it prints, and what it says where it was mistyped."""

import re
import shutil

import pytest

from data.index import DocumentIndex
from data.preparation.data_report import REPORT
from examples import inspect_data
from tests.support.chatting import small_tokenizer
from tests.support.reporting import ANSWERS, END, write_data


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("inspected") / "data")


def as_prefix(data, folder):
    """The token files of a data directory by themselves, under a prefix in `folder`."""
    for ending in (".bin", ".idx"):
        shutil.copy(data / f"tokens{ending}", folder / f"other{ending}")
    return folder / "other"


@pytest.fixture
def show(capsys):
    """What the script prints, once its exit status is as expected."""

    def run(*arguments, status: int = 0) -> str:
        assert inspect_data.main(list(map(str, arguments))) == status
        captured = capsys.readouterr()
        assert status == 0 or not captured.out
        return captured.out if status == 0 else captured.err

    return run


def shown(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"^document (\d+) of 14, ", text, re.MULTILINE)]


def test_without_flags_it_prints_a_summary_and_three_documents(folder, show):
    text = show(folder)
    assert f"{folder}: 64 rows, 14 documents, 2 held out, 48 dropped" in text
    lengths = DocumentIndex(folder).lengths
    table = re.findall(r"│ +(.*?) +│ +(\d+) │ +([\d,]+) │ +[\d.]+% │ +([\d.]+) │ +(\d+) │", text)
    assert [row[:2] for row in table] == [
        ("maths", "8"),
        ("<b>[tools]", "6"),
        ("all", "14"),
        ("question_answer", "8"),
        ("tools", "2"),
        ("messages", "4"),
    ]
    assert table[2][2:] == (f"{lengths.sum():,}", f"{lengths.mean():.1f}", f"{lengths.max()}")
    assert len(set(shown(text))) == 3


def test_a_row_is_a_document_by_its_number(folder, show):
    text = show(folder, "--row", 11, 0)
    assert shown(text) == [11, 0] and "rows," not in text
    assert f"source <b>[tools], kind messages\n{len(DocumentIndex(folder).tokens(11))} tokens, " in text
    assert f"<|im_start|>assistant↵\n[[{ANSWERS[11]}{END}]]\n" in text and f"[[{ANSWERS[0]}{END}]]" in text


def test_documents_of_a_source_and_a_kind_are_drawn_by_the_seed(folder, show):
    assert shown(show(folder, "--source", "maths", "--random", 8)) == list(range(8))
    assert shown(show(folder, "--source", "<b>[tools]", "--kind", "tools")) == [8, 9]
    drawn = {tuple(shown(show(folder, "--kind", "question_answer", "--seed", seed))) for seed in (0, 0, 1, 2)}
    assert len(drawn) == 3 and all(len(set(one)) == 3 and max(one) < 8 for one in drawn)
    assert shown(show(folder, "--random", 100)) == list(range(14))


def test_dropped_rows_are_shown_by_reason(folder, show):
    text = show(folder, "--dropped")
    assert re.findall(r"^(.*): (\d+) of 64 rows$", text, re.MULTILINE) == [
        ("not JSON", "40"),
        ("unknown fields", "7"),
        ("odd <script>alert('x')</script>", "1"),
    ]
    assert text.count("a.jsonl:1: why 0") == 3
    text = show(folder, "--dropped", "unknown", "fields", "--random", 5)
    assert re.findall(r"why (\d)", text) == list("01234") and "not JSON" not in text
    assert '"text": "4 \\ud800"' in text


def test_a_prefix_shows_ids_or_the_text_of_a_tokenizer(folder, show, tmp_path):
    small_tokenizer().save_pretrained(tmp_path)
    ids = DocumentIndex(folder).tokens(3).tolist()
    prefix = as_prefix(folder, tmp_path)
    text = show(prefix, "--row", 3)
    assert f"document 3 of 14, source other, kind text\n{len(ids)} tokens, {len(ids) - 1} supervised" in text
    assert f"{ids[0]} [[{' '.join(map(str, ids[1:]))} ]]" in text
    assert f"assistant↵\n{ANSWERS[3]}{END}]]" in show(tmp_path / "other.bin", "--row", 3, "--tokenizer", tmp_path)
    assert show(prefix, "--dropped") == "no row was dropped\n"


def test_the_page_is_written_again(folder, show):
    assert show(folder, "--report") == f"{folder / REPORT}\n"
    assert ANSWERS[3] in (folder / REPORT).read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--row", "3", "14"], "--row 14: DATA has 14 documents, 0 to 13"),
        (["--row", "-1"], "--row -1: DATA has 14 documents, 0 to 13"),
        (["--source", "math"], "--source math: DATA has the sources maths, <b>[tools]"),
        (["--kind", "tool"], "--kind tool: DATA has the kinds question_answer, tools, messages"),
        (["--source", "maths", "--kind", "tools"], "--source maths --kind tools: DATA has no such document"),
        (["--dropped", "unknown"], "--dropped unknown: DATA has the reasons not JSON, unknown fields, odd"),
        (["--row", "3", "--source", "maths"], "--row names documents by itself: leave --source out"),
        (["--random", "0"], "--random 0: give how many documents to show, at least 1"),
    ],
)
def test_mistakes_are_one_sentence(folder, show, arguments, sentence):
    text = show(folder, *arguments, status=2)
    assert text.startswith(f"error: {sentence}".replace("DATA", str(folder))) and text.count("\n") == 1


def test_a_tokenizer_of_other_data_is_refused(folder, show, tmp_path):
    small_tokenizer().save_pretrained(tmp_path)
    other = write_data(tmp_path / "data", with_tokenizer=False)
    (tmp_path / "small").mkdir()
    backend = small_tokenizer().backend_tokenizer.from_str(
        '{"model": {"type": "WordLevel", "vocab": {"a": 0, "b": 1}, "unk_token": "a"}}'
    )
    backend.save(str(tmp_path / "small" / "tokenizer.json"))
    prefix = as_prefix(other, tmp_path)
    sentence = show(prefix, "--row", 0, "--tokenizer", tmp_path / "small", status=2)
    largest = DocumentIndex(other).tokens(0).max()
    assert sentence.startswith(
        f"error: --tokenizer {tmp_path / 'small'} has no token {largest}, which document 0 holds"
    )
    (tmp_path / "small" / "tokenizer.json").write_text("{")
    assert "is no tokenizer that can be read" in show(other, "--tokenizer", tmp_path / "small", status=2)
    assert "there is no such data directory" in show(tmp_path / "nothing", status=2)
    assert "is no data directory that a report could" in show(prefix, "--report", status=2)

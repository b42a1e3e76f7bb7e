"""The page about a data directory, the numbers on it, and documents with their supervised tokens marked."""

import io
import re
from html import unescape

import numpy as np
import pytest
from rich.console import Console
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

import data.preparation.measures as measures
from data.index import DocumentIndex, write_index
from data.preparation.data_report import write_data_report
from data.preparation.dropped import find_dropped, row_text
from data.preparation.report_parts import percent, short
from data.preparation.samples import Gap, document_html, print_document, saved_tokenizer, shown_parts
from tests.support.chatting import WORDS, small_tokenizer
from tests.support.reporting import ANSWERS, END, REASONS, SCRIPT, document, write_data


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("report") / "data")


@pytest.fixture(scope="module")
def page(folder):
    return write_data_report(folder, small_tokenizer()).read_text(encoding="utf-8")


def printed(tokens, spans, *, tokenizer=None, colour: bool = False, **options) -> str:
    file = io.StringIO()
    console = Console(file=file, width=20, force_terminal=colour, color_system="standard" if colour else None)
    print_document(console, tokenizer, tokens, spans, "title", **options)
    return file.getvalue()


def section(page: str, anchor: str) -> str:
    return page.split(f'id="{anchor}"')[1].split("</section>")[0]


def cells(html: str) -> list[list[str]]:
    """The text of a table, row by row."""
    rows = re.findall("<tr>(.*?)</tr>", html)
    return [
        [unescape(re.sub("<.*?>", "", cell)) for cell in re.findall("<t[hd]>(.*?)</t[hd]>", row, re.DOTALL)]
        for row in rows
    ]


def metaspace_tokenizer() -> Tokenizer:
    """Pieces that hold the space before them, as SentencePiece has them, whose decoder drops the first space."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=80, special_tokens=["<s>", "<unk>"], unk_token="<unk>")
    tokenizer.train_from_iterator([WORDS.strip()] * 20, trainer)
    return tokenizer


def test_supervised_tokens_stand_in_brackets_where_there_is_no_colour():
    tokens, spans = document("How  many?", "Four\n\n more, a line longer than the console")
    assert printed(tokens, spans, tokenizer=small_tokenizer()) == (
        f"title\n{len(tokens)} tokens, {spans[0, 1] - spans[0, 0]} supervised"
        f" ({percent(spans[0, 1] - spans[0, 0], len(tokens))}) in 1 span\n"
        f"<|im_start|>user↵\nHow  many?{END}↵\n<|im_start|>assistant↵\n"
        f"[[Four↵\n↵\n more, a line longer than the console{END}]]\n"
    )


def test_supervised_tokens_are_coloured_in_a_terminal():
    tokens, spans = document("How many?", "Four ")
    text = printed(tokens, spans, tokenizer=small_tokenizer(), colour=True)
    assert "\x1b[30;42mFour \x1b[0m" in text and f"\x1b[1;30;42m{END}" in text
    assert text.count(";42m") == 2 and "[[" not in text


def test_what_would_steer_a_terminal_is_shown():
    tokens, spans = document("a\x1b[31mb\r\x9b\u202ec", "d\te")
    text = printed(tokens, spans, tokenizer=small_tokenizer())
    assert "a␛[31mb␍\\x9b\\u202ec" in text and re.search("d→ +e", text)


def test_characters_of_several_tokens_are_whole():
    tokens, _ = document("é 😀", "naïve 😀")
    tokenizer = small_tokenizer()
    fire = tokenizer("😀", add_special_tokens=False)["input_ids"]
    assert len(fire) == 4  # one byte each, by this tokenizer
    start = next(i for i in range(len(tokens)) if tokens[i : i + 4].tolist() == fire)
    whole = printed(tokens, np.array([[start, start + 4]]), tokenizer=tokenizer)
    assert "é [[😀]]" in whole and whole.count("😀") == 2 and "\ufffd" not in whole
    inside = printed(tokens, np.array([[start + 2, start + 4]]), tokenizer=tokenizer)
    assert inside.count("😀") == 1 and "naïve 😀" in inside
    before, after = inside.split("[[")
    assert before.endswith("é \ufffd") and re.match("\ufffd+]]", after)
    assert "[[\ufffd]]" in printed(tokens, np.array([[start + 1, start + 2]]), tokenizer=tokenizer)


@pytest.mark.parametrize("make", [metaspace_tokenizer, lambda: small_tokenizer().backend_tokenizer])
def test_runs_joined_are_the_text(make):
    tokenizer = make()
    ids = np.array(tokenizer.encode("how many apples are left after two?", add_special_tokens=False).ids)
    generator = np.random.default_rng(0)
    for _ in range(20):
        spans = np.sort(generator.choice(len(ids) + 1, 4, replace=False)).reshape(2, 2)
        runs = list(shown_parts(tokenizer, ids, spans, None))
        assert "".join(run.text for run in runs) == tokenizer.decode(ids.tolist())
        assert [[run.start, run.stop] for run in runs if run.supervised] == spans.tolist()
        assert sum(run.stop - run.start for run in runs) == len(ids)


def test_long_documents_are_cut_in_the_middle():
    tokens, spans = np.arange(2000) % 300, np.array([[300, 600], [1500, 1700]])
    head, *_, tail = parts = list(shown_parts(None, tokens, spans, 1001))
    (gap,) = (part for part in parts if isinstance(part, Gap))
    assert (gap.tokens, gap.supervised) == (999, 100)
    assert head.start == 0 and parts[parts.index(gap) - 1].stop == 500
    assert parts[parts.index(gap) + 1].start == 1499 and tail.stop == 2000
    text = printed(tokens, spans)
    assert "... 1,200 tokens left out, 300 of them supervised ..." in text
    assert text.count("[[") == text.count("]]") == 2
    whole = printed(tokens, spans, full=True).splitlines()[2]
    assert re.sub(r"\[\[|]]", "", whole).split() == list(map(str, tokens.tolist()))


def test_html_says_the_same_and_is_escaped():
    tokens, spans = document(SCRIPT, 'a & b < "c"')
    html = document_html(small_tokenizer(), tokens, spans, "<i>title")
    marked = "".join(re.findall("<mark>(.*?)</mark>", html, re.DOTALL))
    assert unescape(re.sub("</?b>", "", marked)) == f'a & b < "c"{END}'
    assert "<h4>&lt;i&gt;title</h4>" in html and "<script" not in html and "&lt;script&gt;" in html


def test_the_page_needs_nothing_and_runs_nothing(folder, page):
    assert not re.search(r"<script|<link|<img|src=|http|url\(|@import| on\w+=", page)
    assert "prefers-color-scheme: dark" in page
    assert len(page) < 60_000
    assert write_data_report(folder, small_tokenizer()).read_text(encoding="utf-8") == page
    # of the library that transformers' tokenizer wraps, read from the directory itself
    assert write_data_report(folder, saved_tokenizer(folder / "tokenizer")).read_text(encoding="utf-8") == page


def test_the_page_counts_rows_and_tokens(folder, page):
    index = DocumentIndex(folder)
    tiles = dict((name, value) for value, name in re.findall('"tile"><b>(.*?)</b><span>(.*?)<', page))
    supervised = sum(int(stop - start) for number in range(len(index)) for start, stop in index.spans(number))
    assert tiles == {
        "rows": "64",
        "documents": "14",
        "tokens": f"{index.lengths.sum()}",
        "supervised": percent(supervised, index.lengths.sum()),
        "longest": f"{index.lengths.max()}",
        "held out": "2",
        "filtered": "0",
        "dropped": "48",
    }
    rows = dict(re.findall(r"</i>([a-z ]+) ([\d,]+) \(", section(page, "rows")))
    assert rows == {"documents here": "14", "held out": "2", "dropped": "48"}
    tokens = re.findall(r"</i>([a-z: ]+) ([\d,]+) \(", section(page, "tokens"))
    assert [int(count.replace(",", "")) for _, count in tokens] == [supervised, index.lengths.sum() - supervised]


def test_the_page_has_a_line_for_each_source_and_kind(folder, page):
    lengths = DocumentIndex(folder).lengths
    (_, maths, tools), (_, *kinds) = cells(section(page, "sources")), cells(section(page, "kinds"))
    assert maths[:6] == ["maths", "10", "0", "40", "8", f"{lengths[:8].sum():,}"]
    assert tools[:6] == ["<b>[tools]", "6", "", "0", "6", f"{lengths[8:].sum():,}"]
    assert [row[:2] for row in kinds] == [["question_answer", "8"], ["tools", "2"], ["messages", "4"]]
    assert [row[-1] for row in kinds] == [str(part.max()) for part in (lengths[:8], lengths[8:10], lengths[10:])]
    notes = unescape(section(page, "notes"))
    assert "<b>lost socks</b> </dt><dd>4,321</dd>" in notes  # nobody told the page of it
    assert "in the rows of maths</dt><dd>url</dd>" in notes and "open turns" not in notes


def test_the_page_shows_every_reason_with_one_row(page):
    dropped = unescape(section(page, "dropped"))
    for reason, count in REASONS.items():
        assert f"<h3>{reason}</h3><p>{count} rows, {percent(count, 64)} of all</p><p>a.jsonl:1: why 0</p>" in dropped
    assert dropped.count("{not json") == 1 and dropped.count('"text": "0 \\ud800"') == 2
    assert "<script" not in section(page, "dropped")


def test_the_page_shows_samples_of_every_kind(page):
    titles = re.findall("<h4>(.*?)</h4>", section(page, "samples"))
    kinds = [re.sub("document .* of 14, ", "", unescape(title)) for title in titles]
    tools = ["source <b>[tools], kind tools"] * 2 + ["source <b>[tools], kind messages"] * 2
    assert kinds == ["source maths, kind question_answer"] * 2 + tools
    marked = re.findall("<mark>([^<]*)</mark><mark><b>(.*?)</b></mark>", section(page, "samples"))
    assert len(marked) == 6 and all(text in ANSWERS and unescape(end) == END for text, end in marked)


def test_an_older_directory_without_a_tokenizer(tmp_path):
    folder = write_data(tmp_path / "old", named=False, with_tokenizer=False)
    assert saved_tokenizer(folder / "tokenizer") is None
    page = write_data_report(folder, None).read_text(encoding="utf-8")
    assert [row[:2] for row in cells(section(page, "sources"))] == [["source", "documents"], ["old", "14"]]
    number = int(re.search(r"<h4>document (\d+) of 14, source old, kind unknown</h4>", page).group(1))
    ids = " ".join(map(str, DocumentIndex(folder).tokens(number).tolist()))
    assert ids in re.sub("</?mark>", "", section(page, "samples"))
    assert "ids are shown" in page and "How many" not in page


def test_documents_without_supervised_tokens_are_named(tmp_path):
    write_index(tmp_path / "data", [([5, 6, 7], []), ([5, 6, 7, 8], [[1, 4]])], vocab_size=100)
    page = write_data_report(tmp_path / "data", None).read_text(encoding="utf-8")
    assert "1 of 2 documents have no supervised token." in section(page, "share")
    assert "No row was dropped." in section(page, "dropped")


def test_packing_is_counted_with_what_does_not_fit():
    found = {fill.capacity: fill for fill in measures.fills(np.array([1000] * 5 + [3000]))}
    assert (found[2048].sequences, found[2048].longer, found[2048].fill) == (3, 1, 5000 / (3 * 2048))
    assert (found[4096].sequences, found[4096].longer, found[4096].fill) == (2, 0, 8000 / (2 * 4096))
    assert (found[131072].sequences, found[131072].fill) == (1, 8000 / 131072)
    (full, *_) = measures.fills(np.array([2048]))
    assert (full.sequences, full.longer, full.fill) == (1, 0, 1.0)
    (none, *_) = measures.fills(np.array([5000]))
    assert (none.sequences, none.longer, none.fill) == (0, 1, None)


def test_a_sample_of_many_documents_packs_like_all(monkeypatch):
    lengths = np.random.default_rng(0).integers(50, 1500, 20_000)
    exact = measures.fills(lengths)
    monkeypatch.setattr(measures, "PACKED_DOCUMENTS", 2000)
    sampled = measures.fills(lengths)
    assert sampled[0].sequences == pytest.approx(exact[0].sequences / 10, rel=0.05)
    assert sampled[0].fill == pytest.approx(exact[0].fill, abs=0.01)
    assert [fill.longer for fill in sampled] == [fill.longer for fill in exact]


def test_repeats_are_counted(folder):
    index = DocumentIndex(folder)
    found = measures.repeats(index, measures.supervised_tokens(index))
    assert (found.compared, found.repeated, found.most) == (14, 2, ((3, 3),))


def test_a_sample_holds_all_copies_of_a_document_or_none(tmp_path, monkeypatch):
    generator = np.random.default_rng(0)
    single = [generator.integers(0, 90, generator.integers(5, 200)) for _ in range(1500)]
    documents = [single[number] for number in generator.permutation(np.repeat(np.arange(1500), 2))]
    write_index(tmp_path / "data", [(one, [[0, 1 + len(one) // 2]]) for one in documents], vocab_size=100)
    index = DocumentIndex(tmp_path / "data")
    supervised = measures.supervised_tokens(index)
    assert measures.repeats(index, supervised).repeated == 1500
    monkeypatch.setattr(measures, "COMPARED_DOCUMENTS", 1000)
    sampled = measures.repeats(index, supervised)
    assert sampled.compared == 1000 and sampled.repeated == pytest.approx(500, abs=10)
    monkeypatch.setattr(measures, "COMPARED_TOKENS", 20_000)
    assert measures.repeats(index, supervised).compared == pytest.approx(200, rel=0.2)


def test_supervised_tokens_are_summed_over_blocks(tmp_path, monkeypatch):
    generator = np.random.default_rng(1)
    spans = [np.sort(generator.choice(50, 2 * (number % 4), replace=False)).reshape(-1, 2) for number in range(40)]
    write_index(tmp_path / "data", [(np.zeros(50, int), one) for one in spans], vocab_size=10)
    monkeypatch.setattr(measures, "_BLOCK", 7)
    counted = measures.supervised_tokens(DocumentIndex(tmp_path / "data"))
    assert counted.tolist() == [int((one[:, 1] - one[:, 0]).sum()) for one in spans]


def test_every_kind_is_sampled_before_any_is_sampled_twice(folder):
    index = DocumentIndex(folder)
    kinds = [int(index.kind_numbers[one]) for one in measures.choose_samples(index, 2, 40)]
    assert kinds == [0, 0, 1, 1, 2, 2]
    assert [int(index.kind_numbers[one]) for one in measures.choose_samples(index, 2, 4)] == [0, 0, 1, 2]
    assert [int(index.kind_numbers[one]) for one in measures.choose_samples(index, 2, 2)] == [0, 1]
    assert measures.choose_samples(index, 20, 40) == list(range(14))
    index.sources, index.kind_numbers = np.arange(14) % 2, np.arange(14) // 7  # every kind in every source
    assert {(one % 2, one // 7) for one in measures.choose_samples(index, 1, 40)} == {(0, 0), (1, 0), (0, 1), (1, 1)}


@pytest.mark.parametrize("lengths", [[1], [5, 5], [64, 64, 65, 127, 128], [1, 2, 3, 100_000], [2**17]])
def test_every_length_is_in_one_bar(lengths):
    edges = measures.length_edges(np.array(lengths))
    assert edges[0] <= min(lengths) and max(lengths) < edges[-1] and (np.diff(edges) > 0).all()
    assert edges[1] > min(lengths) and edges[-2] <= max(lengths)  # and no bar at an end is empty


def test_dropped_rows_are_found_by_their_reason(folder):
    found = find_dropped(folder, ["unknown fields", "not JSON"], each=3)
    assert [drop["line"] for drop in found["unknown fields"]] == [1, 2, 3]
    assert {drop["reason"] for drop in found["unknown fields"]} == {"unknown fields"}
    assert [drop["row"] for drop in found["not JSON"]] == ["{not json"] * 3
    assert len(find_dropped(folder, ["unknown fields"], each=100)["unknown fields"]) == 7  # another row says it, too
    assert find_dropped(folder, ["never seen"]) == {"never seen": []}


def test_rows_are_clipped_and_printable():
    assert row_text({"a": "x" * 700}).endswith("x ... 112 characters more")
    assert row_text("\x1b[31m \ud800", None) == "␛[31m \\ud800"


def test_shares_and_numbers_in_few_characters():
    shown = [percent(part, 10_000) for part in (0, 1, 10, 1234, 9995, 10_000)] + [percent(0, 0)]
    assert shown == ["0%", "<0.1%", "0.1%", "12.3%", ">99.9%", "100%", "0%"]
    assert [short(number) for number in (999, 9_999, 12_345, 999_900, 4_060_000)] == [
        "999", "9,999", "12.3k", "1M", "4.06M",
    ]  # fmt: skip

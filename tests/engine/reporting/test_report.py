"""The report page: self-contained, escaped, right in its numbers, and readable for 1 and for 30,000 steps."""

import itertools
import json
import math
import re
from html.parser import HTMLParser

import pytest

from engine.reporting.charts import HEIGHT, WIDTH, Curve, bars, line_chart, linear_ticks, log_ticks, number, numbers
from engine.reporting.report import MOST_TOKENS, write_report

VOID = {"meta", "br"}


class Page(HTMLParser):
    """Collects a page's elements and text, and fails on elements that do not nest."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict]] = []
        self.words = ""
        self.feed(text)
        assert not self.open, f"left open: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words += data

    def count(self, tag: str, **attributes) -> int:
        """How many elements have this tag and these attributes."""
        wanted = {name.rstrip("_"): value for name, value in attributes.items()}.items()
        return sum(name == tag and wanted <= found.items() for name, found in self.elements)


def write_metrics(run_dir, steps: int, **changes) -> None:
    """A plausible run with the loss falling from 6; a change may be a function of the step."""
    run_dir.mkdir(parents=True, exist_ok=True)
    with (run_dir / "metrics.jsonl").open("w") as file:
        for step in range(1, steps + 1):
            line = {
                "step": step,
                "loss": 0.3 + 5.7 * math.exp(-8 * step / steps),
                "grad_norm": 1.0 + 0.1 * (step % 7),
                "lr": 1e-4 * step / steps,
                "tokens": 900,
                "supervised_tokens": 300,
                "padding_tokens": 100,
                "seconds": 0.5,
                "tokens_per_second": 1800.0,
                "supervised_tokens_per_second": 600.0,
                "tflops": None,
                "mfu": None,
            }
            changed = {name: value(step) if callable(value) else value for name, value in changes.items()}
            file.write(json.dumps({**line, **changed}) + "\n")


def test_the_page_is_one_file_without_anything_from_outside(tmp_path):
    write_metrics(tmp_path / "run", 40, valid_loss=lambda step: 1.5 if step % 10 == 0 else None)
    path = write_report(tmp_path / "run", title="a run")
    text = path.read_text()
    page = Page(text)
    assert path == tmp_path / "run" / "report.html"
    assert page.count("svg") == 5
    assert not re.search(r"https?:|@import|url\(", text)
    assert not [name for name, found in page.elements if name in ("script", "link", "img") or "src" in found]
    assert sorted(item.name for item in path.parent.iterdir()) == ["metrics.jsonl", "report.html"]
    assert "held-out loss" in page.words


def test_sources_and_held_out_sets_have_cards(tmp_path):
    """A source is absent from most steps, another from all; one held-out set has sources of its own."""
    losses = {
        "source_losses": lambda step: {"math": 2.0 - step / 100, "chat <b>": 3.0 if step == 7 else None, "none": None},
        "source_tokens": lambda step: {"math": 300, "chat <b>": 100 if step == 7 else 0, "none": 0},
        "valid_loss": lambda step: 1.5 if step % 10 == 0 else None,
        "valid_losses": lambda step: {"one": 1.0 + step / 100, "two": None} if step % 10 == 0 else None,
        "valid_losses_at_start": lambda step: {"one": 4.0, "two": None} if step == 1 else None,
        "valid_loss_at_start": lambda step: 4.0 if step == 1 else None,
        "valid_source_losses": lambda step: {"one/math": 0.75} if step % 10 == 0 else None,
    }
    write_metrics(tmp_path, 20, **losses)
    page = Page(write_report(tmp_path).read_text())
    assert page.count("svg") == 7
    assert "Loss by source" in page.words and "Held-out loss by set" in page.words
    facts = ["math1.8000 · 98.4% of supervised tokens", "chat <b>3.0000 · 1.6%", "noneno supervised token · 0.0%"]
    facts += ["one1.2000", "twono supervised token", "one/math0.7500"]
    assert [fact for fact in facts if fact not in page.words] == []
    assert "held-out loss at step 0: 4" in page.words and "one at step 0: 4" in page.words
    assert page.count("path", class_="lost") == 0, "a step without a source's tokens is no failure"
    write_metrics(tmp_path, 20, valid_loss=1.5, valid_losses={"one": 1.5})
    page = Page(write_report(tmp_path).read_text())
    assert page.count("svg") == 5 and "Held-out loss by set" not in page.words


def test_a_chart_of_many_sources_shows_the_largest(tmp_path):
    names = [f"source {number}" for number in range(12)]
    counts = dict(zip(names, range(12, 0, -1), strict=True))
    write_metrics(tmp_path, 3, source_losses=dict.fromkeys(names, 1.0), source_tokens=counts)
    page = Page(write_report(tmp_path).read_text())
    assert "the chart shows 8 of 12" in page.words and "source 7 at step 2: 1" in page.words
    assert "source 8 at step" not in page.words and "source 111.0000 · 1.3%" in page.words


def test_the_numbers_add_up(tmp_path):
    write_metrics(tmp_path, 10, loss=lambda step: 2.0 / step)
    page = Page(write_report(tmp_path).read_text())
    for wanted in ("0.2000", "90.00%", "33.3%", "1.8k", "10,000 token slots", "3,000", "6,000", "1,000"):
        assert wanted in page.words, wanted
    assert "10 steps: mean 90.00%" in page.words
    page = Page(write_report(tmp_path, fill=[0.5, 1.0, 0.75]).read_text())
    assert "3 packed sequences: mean 75.00%, least 50.00%" in page.words


def test_everything_foreign_is_escaped(tmp_path):
    write_metrics(tmp_path, 3)
    evil = "</span><script>alert(1)</script>"
    (tmp_path / "config.yaml").write_text(f"model: '{evil}'\noptim:\n  lr: 3e-4\nodd: '{evil}'\n")
    page = Page(write_report(tmp_path, title=evil, sample=[(evil, True), (" a & b", False)]).read_text())
    assert page.count("script") == 0
    # Title, heading, the model's fact, twice in the whole configuration, and the sample.
    assert page.words.count(evil) == 6


def test_the_sample_shows_its_mask(tmp_path):
    write_metrics(tmp_path, 3)
    sample = [("user", False), ("\n", False), ("8", True), ("5", True), ("", True)]
    page = Page(write_report(tmp_path, sample=sample).read_text())
    assert page.count("span", class_="on") == 3
    assert page.count("span", title="token 1: masked") == 1
    assert page.count("span", title="token 2: supervised") == 1
    assert "5 tokens, 3 of them supervised" in page.words
    assert "supervised: the model learns to write it" in page.words
    long = [("x", index % 2 == 0) for index in range(MOST_TOKENS + 10)]
    page = Page(write_report(tmp_path, sample=long).read_text())
    assert page.count("span", class_="on") == MOST_TOKENS // 2
    assert f"the first {MOST_TOKENS:,} are shown" in page.words


def graded(folder, model: str, name: str, score: float, **more) -> dict:
    """One result of a summary, and the file that it names."""
    number = model.removeprefix("step_")
    path = folder / "evaluation" / model / name / "results.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("{}")
    entry = {"model": model, "step": int(number) if number.isdecimal() else None, "name": name, "score": score}
    entry |= {"scores": {"pass@1": score, "maj@4": 0.5}, "questions": 1500, "comparable": True}
    return entry | {"results": f"{model}/{name}/results.json"} | more


def test_graded_answers_have_a_card(tmp_path):
    write_metrics(tmp_path, 30)
    assert "Answers" not in Page(write_report(tmp_path).read_text()).words
    results = [graded(tmp_path, f"step_{step:06d}", "<b>gsm", step / 40) for step in (10, 20, 30)]
    results += [
        graded(tmp_path, "step_000010", "aime", 0.0, comparable=False),
        graded(tmp_path, "average", "aime", 1.0),
    ]
    best = {"<b>gsm": {"step": 30, "model": "step_000030", "score": 0.75}}
    file = tmp_path / "evaluation" / "summary.json"
    file.write_text(json.dumps({"results": results, "best": best}))
    page = Page(write_report(tmp_path).read_text())
    assert page.count("svg") == 6 and page.count("b", title="") == 0
    assert "pass@1 of the exported steps · <b>gsm: step 30 is best (0.7500)" in page.words
    assert "step_000030, <b>gsmpass@1 0.7500 · maj@4 0.5000 · 1,500 questions · best step" in page.words
    assert "<b>gsm at step 20: 0.5" in page.words and "aime at step" not in page.words
    assert "step_000010, aimepass@1 0.0000 · maj@4 0.5000 · 1,500 questions · asked otherwise" in page.words
    (tmp_path / "evaluation" / "step_000030" / "<b>gsm" / "results.json").unlink()  # the run went back before it
    page = Page(write_report(tmp_path).read_text())
    assert "is best" not in page.words and "step_000030" not in page.words and "step_000020" in page.words
    why = "--model <hf> cannot be loaded"
    failed = {"gsm": {"state": "failed", "failed": {"step_000040": why}}, "aime": {"state": "done", "failed": {}}}
    for shown, there in ((results, "step_000020"), ([], "pass@1")):  # beside results, and alone
        file.write_text(json.dumps({"results": shown, "best": {}, "watched": failed}))
        page = Page(write_report(tmp_path).read_text())
        assert f"step_000040, gsmnot graded: {why}" in page.words and there in page.words
        assert page.words.count("not graded") == 1
    broken = '{"results": [], "best": {}, "watched": {"a": "done"}}'
    for damaged in ('{"results": 7}', "{", '{"results": [{"model": 1}], "best": {}}', broken):
        file.write_text(damaged)
        assert "Answers" not in Page(write_report(tmp_path).read_text()).words


def test_a_page_can_keep_its_sample(tmp_path):
    """As one does that is written by others than the run, which alone knows its data."""
    write_metrics(tmp_path, 3)
    assert "One sample" not in write_report(tmp_path, keep_sample=True).read_text()
    page = write_report(tmp_path, sample=[("<!-- sample -->", True), ("end", False)]).read_text()
    write_metrics(tmp_path, 5)
    kept = write_report(tmp_path, keep_sample=True).read_text()
    assert "steps 1 to 5" in kept and "2 tokens, 1 of them supervised" in Page(kept).words
    assert kept.split("<h2>One sample")[1] == page.split("<h2>One sample")[1]
    assert write_report(tmp_path, keep_sample=True).read_text() == kept
    assert "One sample" not in write_report(tmp_path).read_text()


def test_one_step_is_enough_and_none_is_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no steps"):
        write_report(tmp_path)
    write_metrics(tmp_path, 1)
    page = Page(write_report(tmp_path).read_text())
    assert page.count("circle") == 5, "loss, gradient norm, learning rate and two rates, a dot each"
    assert "1 step: mean 90.00%" in page.words


def test_thirty_thousand_steps_stay_small_and_keep_their_spikes(tmp_path):
    write_metrics(tmp_path, 30_000, grad_norm=lambda step: 25.0 if step == 12_345 else 1.0)
    text = write_report(tmp_path).read_text()
    assert len(text) < 400_000
    assert "NaN" not in text
    points = Curve(label="norm", colour="#000000", points=[(i, 25.0 if i == 12_345 else 1.0) for i in range(30_000)])
    band = re.search(r'<path d="M([^"]*)Z"', line_chart([points], label="norm")).group(1)
    heights = [float(place.split(",")[1]) for place in band.split("L")]
    assert min(heights) < 40, "the spike reaches the chart's top"
    assert max(heights) > 200


def test_steps_without_a_finite_value_are_marked_and_leave_a_gap(tmp_path):
    points = [(step, None if step in (4, 5) else 1.0 + step) for step in range(1, 10)]
    drawn = line_chart([Curve(label="loss", colour="#123456", points=points)], label="loss")
    assert drawn.count('class="lost"') == 2
    assert drawn.count('class="line"') == 2
    assert "loss at step 4: not finite" in drawn
    write_metrics(tmp_path, 4, loss=None, grad_norm=None)
    page = Page(write_report(tmp_path).read_text())
    assert page.words.count("No values were recorded.") == 2
    assert "not finite" in page.words


def test_every_drawn_place_lies_inside_the_chart():
    points = [(step, math.exp(-step / 20) * 50) for step in range(1, 200)]
    drawn = line_chart([Curve(label="loss", colour="#123456", points=points)], label="loss")
    assert "logarithmic" in drawn
    path = re.search(r'<path d="M([^"]*)" class="line"', drawn).group(1)
    places = [tuple(map(float, place.split(","))) for place in path.split("L")]
    assert len(places) == 199
    assert all(0 <= x <= WIDTH and 0 <= y <= HEIGHT for x, y in places)
    assert [y for _, y in places] == sorted(y for _, y in places), "a falling curve goes down"


def test_ticks_and_numbers_are_round():
    assert linear_ticks(0, 10) == [0, 2, 4, 6, 8, 10]
    assert linear_ticks(0.31, 0.62) == pytest.approx([0.4, 0.5, 0.6])
    assert log_ticks(0.05, 5) == pytest.approx([0.05, 0.1, 0.2, 0.5, 1, 2, 5])
    assert log_ticks(1e-4, 1e3) == pytest.approx([10.0**power for power in range(-4, 4)])
    values = (0, 0.0342, 12.5, 3200, 1.5e6, 3e-4, -2000)
    assert [number(value) for value in values] == ["0", "0.0342", "12.5", "3.2k", "1.5M", "3e-04", "-2k"]


def test_labels_of_one_axis_differ():
    assert numbers([0.001, 0.0009995, 0.000999]) == ["1e-3", "9.995e-4", "9.99e-4"]
    assert numbers([0.001, 0.0009995]) == ["1e-3", "9.995e-4"]
    assert numbers([0.0, 1000.0, 1500.0]) == ["0", "1k", "1.5k"]
    assert numbers([1e6, 1.0005e6, 1.001e6]) == ["1e6", "1.0005e6", "1.001e6"]
    lr = Curve(label="lr", points=[(step, 1e-3 * math.cos(step / 2000)) for step in range(1, 56)], colour="#000")
    labels = re.findall(r'class="tick" text-anchor="end">([^<]*)<', line_chart([lr], label="Learning rate"))
    assert len(labels) > 2 and len(set(labels)) == len(labels)


def test_the_page_says_how_full_bins_were_and_why_the_run_stopped(tmp_path):
    lines = [{"step": s, "loss": 1.0, "tokens": 50 * s, "padding_tokens": 1, "bin_fill": 0.5} for s in (1, 2)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert "stopped" not in write_report(tmp_path).read_text()
    (tmp_path / "unfinished").write_text("saved and stopped after step 2 of 9: SIGTERM was received\n")
    words = Page(write_report(tmp_path).read_text()).words
    assert "50.00%of packed sequences filled" in words and "mean 50.00%" in words
    assert "steps 1 to 2" in words and "; saved and stopped after step 2 of 9: SIGTERM was received" in words


def test_a_configuration_that_is_not_yaml_is_still_shown(tmp_path):
    write_metrics(tmp_path, 2)
    (tmp_path / "config.yaml").write_text("model: [unclosed\n")
    assert "model: [unclosed" in Page(write_report(tmp_path).read_text()).words


def test_facts_come_from_nested_options(tmp_path):
    write_metrics(tmp_path, 2)
    (tmp_path / "config.yaml").write_text("tp: 4\noptim:\n  lr: 2e-5\n  schedule: cosine\ndata: [a, b]\nvpp: null\n")
    text = write_report(tmp_path).read_text()
    facts = re.findall(r"<dt>([^<]*)</dt><dd>([^<]*)</dd>", text)
    assert facts == [
        ("Data", "a, b"),
        ("Tensor parallel", "4"),
        ("Learning rate", "2e-5"),
        ("Schedule", "cosine"),
    ]


@pytest.mark.parametrize("experts", [8, 128])
def test_experts_have_a_card_of_their_own(tmp_path, experts):
    write_metrics(tmp_path, 20)
    assert "Experts" not in write_report(tmp_path, title="dense").read_text()
    changes = {
        "tokens_per_expert": lambda step: [0 if expert in (1, 5) else step + expert for expert in range(experts)],
        "expert_imbalance": lambda step: [1.5, 4 - step / 10, 1.25, None],
    }
    write_metrics(tmp_path, 20, **changes)
    page = Page(write_report(tmp_path).read_text())
    assert page.count("svg") == 7
    share = {8: "2 of 8 experts (25.0%)", 128: "2 of 128 experts (1.6%)"}[experts]
    assert f"At step 20, {share} got no token; the worst layer is number 1, counted from 0: its fullest" in page.words
    assert "got 2.00 times the mean" in page.words
    assert f"expert {experts - 1}: {20 + experts - 1}" in page.words
    assert page.count("path", class_="lost") == 2, "the experts without a token"
    assert "mean of the layers at step 20: 1.58\nworst layer at step 20: 2" in page.words
    assert page.count("div", class_="wide") == 0
    write_metrics(tmp_path, 20, **changes, aux_loss=lambda step: 1 + 1 / step)
    page = Page(write_report(tmp_path).read_text())
    assert page.count("svg") == 8
    assert "load-balancing loss at step 20: 1.05" in page.words
    assert page.count("div", class_="wide") == page.count("svg", viewbox=f"0 0 {2 * WIDTH} {HEIGHT}") == 1


def test_steps_without_routing_are_no_loss(tmp_path):
    # The first steps were written before the fields existed; at the last one nothing was routed.
    write_metrics(tmp_path, 6)
    early = (tmp_path / "metrics.jsonl").read_text()
    loads = {
        "tokens_per_expert": lambda step: [step % 6, 0],
        "expert_imbalance": lambda step: [2.0 if step < 6 else None],
    }
    write_metrics(tmp_path, 6, **loads)
    late = (tmp_path / "metrics.jsonl").read_text()
    (tmp_path / "metrics.jsonl").write_text("".join(early.splitlines(True)[:3] + late.splitlines(True)[3:]))
    page = Page(write_report(tmp_path).read_text())
    assert "At step 6, 2 of 2 experts (100.0%) got no token" in page.words and "worst layer is" not in page.words
    assert "worst layer at step 4: 2" in page.words and "worst layer at step 3" not in page.words
    assert page.words.count("not finite at step 6") == 2


def test_bars_stand_on_their_axis_and_reach_their_counts():
    drawn = bars([10, 0, 30, 20], label="load", colour="#123456", name="expert", mean="even", width=2 * WIDTH)
    found = re.findall(r'<rect x="([^"]*)" y="([^"]*)" width="([^"]*)" height="([^"]*)"', drawn)
    places = [tuple(map(float, place)) for place in found]
    assert [height / places[0][3] for *_, height in places] == pytest.approx([1, 3, 2], rel=0.01)
    assert len({round(y + height, 1) for _, y, _, height in places}) == 1
    assert all(x > 0 and x + width < 2 * WIDTH and 0 < y < HEIGHT for x, y, width, _ in places)
    assert all(right[0] > left[0] + left[2] for left, right in itertools.pairwise(places))
    assert "<title>even: 15</title>" in drawn

"""Grading: the answer in a text, its verdict by meaning and within its time, and the scores over samples."""

from itertools import combinations

import pytest

from examples.evaluation.extraction import last_boxed, stated_answer, tidy
from examples.evaluation.grading import Grader, Verdict, grade_questions, majority_vote
from examples.evaluation.scores import ks, pass_at_k, score_table


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"\boxed{1} and then \boxed{2}", "2"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed {7} but \boxed{8", "7"),
        (r"\boxed{} nothing", None),
        ("no box", None),
    ],
)
def test_the_last_complete_box_is_the_answer(text, answer):
    assert last_boxed(text) == answer


def test_worked_solutions_state_their_answers():
    assert stated_answer("She sold 48/2 = 24.\n#### 1,072\n") == "1,072"
    assert stated_answer("So it is. The answer is $12$.") == "$12$"
    assert stated_answer(r"#### 5 but \boxed{6}") == "6"
    assert stated_answer("just words 12") is None
    assert [tidy(answer) for answer in ("$1,072.$", " 5. ", "1,2", "12,345.5")] == [
        "1072",
        "5",
        "1,2",
        "12345.5",
    ]


def test_grading_by_meaning_and_within_its_time():
    grader = Grader(request_seconds=4.0)
    cases = [
        ("1/2", r"so \boxed{\frac{2}{4}}", True),
        ("0.5", r"The answer is $\frac12$.", True),
        ("1,234", r"\boxed{1234}", True),
        ("x^2+2x+1", r"\boxed{(x+1)^2}", True),
        ("72", "48 and 24 make 72 clips.", True),
        ("2", r"\boxed{2} no, \boxed{3}", False),
        ("5", "I do not know", False),
    ]
    for gold, text, correct in cases:
        verdict = grader.grade(gold, text)
        assert (verdict.correct, verdict.timed_out) == (correct, False), (gold, text, verdict)
    assert grader.grade("5", "I do not know").answer is None
    first = grader.process.pid
    assert grader.grade("7", r"\boxed{9^{9^{9^{9}}}}") == Verdict(answer="9^{9^{9^{9}}}", correct=False, timed_out=True)
    assert grader.process is None
    assert grader.grade("7", r"\boxed{7.0}") == Verdict(answer="7.0", correct=True)
    assert grader.process.pid != first
    grader.close()


def test_pass_at_k_is_the_mean_over_all_draws():
    for samples, correct in ((5, 0), (5, 2), (6, 5), (4, 4)):
        drawn = [index < correct for index in range(samples)]
        for k in range(1, samples + 1):
            draws = list(combinations(drawn, k))
            assert pass_at_k(samples, correct, k) == pytest.approx(sum(map(any, draws)) / len(draws), abs=1e-15)
    with pytest.raises(ValueError, match="pass@3"):
        pass_at_k(2, 1, 3)
    assert [ks(samples) for samples in (1, 2, 6, 8)] == [[1], [1, 2], [1, 2, 4, 6], [1, 2, 4, 8]]
    assert score_table(1, [1, 0, 0, 1], [True, False, False, True]) == {"pass@1": 0.5}
    assert score_table(4, [4, 1], [True, False]) == {
        "pass@1": 0.625,
        "pass@2": 0.75,
        "pass@4": 1.0,
        "maj@4": 0.5,
    }


def test_the_majority_goes_by_meaning_and_ties_to_the_earliest_sample():
    graded = grade_questions(
        ["1/2", "3", "4"],
        [
            [r"\boxed{2}", r"\boxed{0.5}", r"\boxed{\frac12}"],
            [r"\boxed{9}", r"\boxed{3}", ""],
            ["", "", ""],
        ],
        num_workers=2,
    )
    assert [question.majority for question in graded] == ["0.5", "9", None]
    assert [question.majority_correct for question in graded] == [True, False, False]
    assert [verdict.correct for verdict in graded[0].verdicts] == [False, True, True]
    grader = Grader()
    votes = [Verdict(answer=answer, correct=answer == "2") for answer in ("1", "2", "2", "1")]
    assert majority_vote(votes, grader) == ("1", False)
    grader.close()

"""Graders: verdicts judged by hand, and no text that hangs, fills or breaks whoever asks."""

import os
import signal
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.evaluation import grading
from pipeline.evaluation.grading import Judge, cleaned, final_answer, same_answer
from schemas.errors import UserError

TABLE = Path(__file__).with_name("grading_pairs.tsv")
PAIRS = [line.split("\t") for line in TABLE.read_text(encoding="utf-8").split("\n") if line and line[0] != "#"]
# What a reader would say and we do not, each with the reason.
MISSES = [
    ("differ", "24 hours", "24 minutes", "units are dropped, as the paper's harness drops them"),
    ("differ", "3 apples", "3 oranges", "the same"),
    ("differ", "10:30", "2:6", "a time is read as a ratio"),
    ("same", "7 million", "7000000", "numbers in words are not read"),
    ("same", "seven", "7", "the same"),
    ("same", r"7^\text{th}", "7", "ordinals are not read"),
    ("same", "Rs. 500", "500", "a currency before the number is known by its sign alone"),
    ("same", "1 foot", "12 inches", "units are not converted"),
]
VARIED = [
    "2x+1",
    "-3",
    "1/2",
    "0.5",
    r"\frac{3}{4}",
    "[0,1)",
    r"\{1,2\}",
    "(1,2)",
    "x=5",
    "50%",
    "B",
    "yes",
    r"\pi",
    "none",
]


@pytest.mark.parametrize(("verdict", "one", "other"), PAIRS)
def test_two_answers_are_the_same_exactly_if_a_reader_says_so_whichever_comes_first(
    verdict: str, one: str, other: str
) -> None:
    assert verdict in ("same", "differ")
    assert [same_answer(one, other), same_answer(other, one)] == [verdict == "same"] * 2


def test_the_table_holds_enough_of_both_kinds_and_no_pair_twice() -> None:
    verdicts = [pair[0] for pair in PAIRS]
    assert len(PAIRS) >= 200 and min(map(verdicts.count, ("same", "differ"))) >= 80
    assert len({frozenset(pair[1:]) for pair in PAIRS if len({*pair[1:]}) > 1}) == sum(p[1] != p[2] for p in PAIRS)


@pytest.mark.parametrize(("verdict", "one", "other", "why"), MISSES)
def test_known_misses(verdict: str, one: str, other: str, why: str, request: pytest.FixtureRequest) -> None:
    request.applymarker(pytest.mark.xfail(reason=why, strict=True))
    assert same_answer(one, other) is (verdict == "same")


@settings(max_examples=150, deadline=None)
@given(st.text(max_size=30) | st.sampled_from([text for pair in PAIRS for text in pair[1:]]))
def test_an_answer_is_the_same_as_itself_unless_it_is_empty(text: str) -> None:
    assert same_answer(text, text) is bool(cleaned(text))


@settings(max_examples=60, deadline=None)
@given(*[st.sampled_from([*VARIED, *(text for pair in PAIRS for text in pair[1:])])] * 2)
def test_the_verdict_does_not_depend_on_which_answer_is_the_right_one(one: str, other: str) -> None:
    assert same_answer(one, other) is same_answer(other, one)


@settings(max_examples=150, deadline=None)
@given(st.integers(-(10**30), 10**30), st.integers(-(10**30), 10**30))
def test_whole_numbers_are_equal_exactly_however_long_and_separated(one: int, other: int) -> None:
    assert same_answer(f"{one:,}", str(other)) is (one == other) and same_answer(f"{one:,}", str(one))


HOSTILE = [
    "9^{9^{9^{9}}}", "99999999!", "{" * 900, r"((1+x)^{999})^{99}", "(" * 500, r"\frac" * 150, "1e999999999", "9" * 999,
    "\x00", "\ud800", "7\n7", "$" * 300, "\\" * 300, "-" * 900, "1," * 450, "7" * 5_000, "__import__('os').abort()",
]  # fmt: skip


@pytest.mark.parametrize("text", HOSTILE)
def test_no_text_hangs_or_ends_the_grader_in_any_thread(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grading, "_judge", Judge(seconds=0.5))
    verdicts: list[object] = []

    def ask() -> None:
        verdicts.append(same_answer(text, "x+1"))
        verdicts.append(isinstance(final_answer(f"so it is {text}"), str))
        verdicts.append(same_answer("x+1", "1+x"))

    thread = threading.Thread(target=ask)
    thread.start()
    thread.join(120)
    grading._judge.end()
    assert verdicts == [False, True, True]


def test_many_threads_get_the_verdicts_they_asked_for() -> None:
    found: dict[int, bool] = {}
    threads = [
        threading.Thread(target=lambda n=n: found.update({n: same_answer(f"{n}x", f"x\\cdot {n % 2 and n}")}))
        for n in range(1, 17)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {n: n % 2 == 1 for n in range(1, 17)}


def test_a_grader_that_was_killed_is_replaced_and_a_forked_process_has_its_own() -> None:
    judge = Judge()
    assert judge.ask("same", "2x", "x+x") is True and judge.process
    judge.process.kill()
    judge.process.wait()
    assert judge.ask("same", "2x", "x+x") is None and judge.ask("same", "2x", "x+x") is True
    first, child = judge.process.pid, os.fork()
    if child == 0:
        os._exit(0 if judge.ask("same", "2x", "x+x") is True and judge.process.pid != first else 1)
    assert os.waitpid(child, 0)[1] == 0 and judge.ask("same", "2x", "3x") is False and judge.process.pid == first
    judge.end()


def test_an_interrupted_question_s_answer_is_not_taken_for_the_next_one_s() -> None:
    judge = Judge()
    assert judge.ask("same", "2x", "x+x") is True
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    signal.setitimer(signal.ITIMER_REAL, 0.2)
    try:
        with pytest.raises(KeyboardInterrupt):
            judge.ask("same", "99999999!", "1")
    finally:
        signal.signal(signal.SIGALRM, before)
    assert judge.ask("same", "2x", "x+x") is True
    judge.end()


def test_numbers_and_words_need_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grading, "_judge", None)
    assert same_answer("1,250.0", "1250") and not same_answer("7", "8") and same_answer("Yes.", "yes")
    assert final_answer("so 7\n#### 7") == "7" and same_answer("3 apples", "3") and same_answer("25%", "0.25")


def test_without_math_verify_the_way_on_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grading, "_judge", Judge())
    monkeypatch.setattr(grading, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'tokensift\[eval\]'"):
        same_answer("2x", "x+x")


def test_a_grader_that_does_not_start_is_told_instead_of_grading_all_as_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grading, "_judge", Judge())
    monkeypatch.setattr(grading, "sys", SimpleNamespace(executable="/bin/false"))
    with pytest.raises(UserError, match=r"does not start; `/bin/false -m pipeline\.evaluation\.verdict 3\.0` says why"):
        same_answer("2x", "x+x")


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (" So 3 + 4 = 7\n#### 7", "7"),
        (" #### 7\nand 9 more", "7"),
        ("#### 1,250 \n\nProblem: #### 3", "1,250"),
        (" the total is 1,250", "1,250"),
        (" the total is $18.50 in all", "18.50"),
        (" it fell by -3.", "-3"),
        (" first 7, then 8", "8"),
        (" so it is 3/4 of it", "3/4"),
        (" which is 12.5% of all", "12.5%"),
        (r"Thus $x = \frac{1}{2}$ holds.", r"x = \frac{1}{2}"),
        (r"We get \boxed{3} and then \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        (r"$\boxed{\{1, 2\}}$", r"\{1, 2\}"),
        (r"\boxed{7", "7"),
        (r"$\boxed 7$ it is", "7"),
        (r"The answer is $\boxed{5}$.", "5"),
        ("The answer is 12. Next, 13.", "12"),
        ("The answer is (C).", "(C)"),
        ("The final answer is $\\frac{3}{5}$. I hope it is correct.", r"$\frac{3}{5}$"),
        ("Answer: 3.5 apples\nmore", "3.5 apples"),
        (" none", ""),
        ("", ""),
        ("####", ""),
    ],
)  # fmt: skip
def test_the_answer_is_what_a_completion_ends_in(text: str, answer: str) -> None:
    assert final_answer(text) == answer


def test_grading_does_not_load_sympy_into_the_asker() -> None:
    code = "import sys; from pipeline.evaluation.grading import same_answer; assert same_answer('2x', 'x+x'); assert 'sympy' not in sys.modules"
    assert os.spawnv(os.P_WAIT, sys.executable, [sys.executable, "-c", code]) == 0

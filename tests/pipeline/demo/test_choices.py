"""Distractors: wrong, plausible, as long as the right result, and the same at every call."""

import random

from hypothesis import given
from hypothesis import strategies as st

from pipeline.demo.choices import distractors, ranked_problems

RESULTS = st.integers(1, 99_999).map(str)


@given(result=RESULTS, others=st.lists(RESULTS, max_size=20), seed=st.integers(0, 99))
def test_distractors_are_three_different_wrong_numbers_of_as_many_digits(
    result: str, others: list[str], seed: int
) -> None:
    found = distractors(result, others, random.Random(seed))
    assert found == distractors(result, others, random.Random(seed))
    if not found:
        return
    assert len({result, *found}) == 4 and {len(number) for number in found} == {len(result)}
    near, swapped, other = found
    assert abs(int(near) - int(result)) in (1, 2, 10)
    assert sorted(swapped) == sorted(result) or abs(int(swapped) - int(result)) in (1, 2, 10)
    assert other in others


def test_a_result_without_another_of_its_length_has_no_distractors() -> None:
    assert distractors("123", ["45", "123"], random.Random(0)) == []
    assert sorted(distractors("45", ["45", "77"], random.Random(0))[1:]) == ["54", "77"]


def test_problems_keep_their_right_result_and_their_template_and_leave_out_what_is_no_whole_number() -> None:
    drawn = [(i % 3, f"Problem {i}?", " so", str(10 + i) if i % 5 else "2.5") for i in range(100)]
    rows = ranked_problems(drawn, 30, "0")
    assert len(rows) == 30 and rows == ranked_problems(drawn, 30, "0") != ranked_problems(drawn, 30, "1")
    results = {prompt: (template, f" #### {result}") for template, prompt, _, result in drawn}
    for row in rows:
        assert (row["template"], row["choices"][row["right"]]) == results[row["prompt"]]
    assert len({row["right"] for row in rows}) == 4

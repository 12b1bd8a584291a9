"""The rule of token dynamics: what numpy.polyfit and a plain loop give; time turned round turns the categories round."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from pipeline.trend import CATEGORIES, PAPER, agreement, categories, changes, means_by

SHAPES = st.tuples(st.integers(2, 16), st.integers(1, 12))
LOSSES = arrays(np.float32, SHAPES, elements=st.floats(0, 12, width=32))


def line_change(losses: np.ndarray) -> float:
    """L_end - L_start of the fitted line, as the paper writes it."""
    x = np.arange(len(losses))
    slope, intercept = np.polyfit(x, losses.astype(np.float64), 1)
    return (slope * x[-1] + intercept) - intercept


def plain_category(losses: np.ndarray, mean_of_last: float) -> str:
    change = line_change(losses)
    if change < -0.2:
        return "H→L"
    if change > 0.2:
        return "L→H"
    return "L→L" if losses[-1] <= mean_of_last else "H→H"


@given(LOSSES)
def test_the_change_is_that_of_the_least_squares_line(losses: np.ndarray) -> None:
    assert changes(losses) == pytest.approx([line_change(token) for token in losses.T], abs=1e-9)


@given(LOSSES)
def test_a_token_has_the_category_that_the_papers_rule_gives(losses: np.ndarray) -> None:
    mean = losses[-1].astype(np.float64).mean()
    for number, change, token in zip(categories(losses), changes(losses), losses.T, strict=True):
        if abs(abs(change) - 0.2) > 1e-6:  # two ways to sum may differ at the edge itself
            assert CATEGORIES[number] == plain_category(token, mean)


@given(LOSSES)
def test_time_turned_round_turns_rises_into_falls(losses: np.ndarray) -> None:
    forth = [CATEGORIES[number] for number in categories(losses)]
    back = [CATEGORIES[number] for number in categories(losses[::-1])]
    turned = {"H→L": "L→H", "L→H": "H→L"}
    for one, other, change in zip(forth, back, changes(losses), strict=True):
        if abs(abs(change) - 0.2) > 1e-6:
            assert turned.get(one, "still") == (other if other in turned else "still")


@pytest.mark.parametrize(
    ("losses", "category"),
    [([3.0, 3.0, 3.0], "H→H"), ([1.0, 2.0, 3.0], "L→H"), ([3.0, 2.0, 1.0], "H→L"), ([1.0, 1.1, 1.0], "L→L"),
     ([2.9, 2.9, 2.71], "H→H"), ([2.9, 2.9, 2.69], "H→L")],
)  # fmt: skip
def test_an_example_of_each(losses: list[float], category: str) -> None:
    beside = [[2.0] * 3, [2.0] * 3]
    assert CATEGORIES[categories(np.array([losses, *beside]).T)[0]] == category


def test_the_papers_shares_are_of_all_tokens() -> None:
    assert sum(PAPER.values()) == pytest.approx(1) and PAPER.keys() == set(CATEGORIES)


def test_means_are_of_a_categorys_own_tokens() -> None:
    values, category = np.array([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]), np.array([0, 2, 0])
    found = means_by(values, category)
    assert found[0].tolist() == [2.0, 5.0] and found[2].tolist() == [2.0, 5.0] and np.isnan(found[1]).all()


@given(arrays(np.bool_, st.tuples(st.integers(1, 6), st.integers(1, 20))))
def test_agreement_is_the_shared_part_of_the_first_set(kept: np.ndarray) -> None:
    found = agreement(kept)
    for i, first in enumerate(kept):
        for j, second in enumerate(kept):
            one, other = set(np.flatnonzero(first)), set(np.flatnonzero(second))
            assert found[i, j] == pytest.approx(len(one & other) / max(1, len(one)))

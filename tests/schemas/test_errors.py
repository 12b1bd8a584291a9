"""What a user's mistake says, and that nothing of it can drive a terminal."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from schemas.errors import Stranded, UserError, first_line, printable


def test_an_error_says_its_problem_and_its_fix() -> None:
    assert str(UserError("no file", "make one")) == "no file; make one"
    assert str(UserError("no file")) == "no file"
    error = Stranded("cut off", "go on")
    assert (error.problem, error.fix, error.args) == ("cut off", "go on", ("cut off", "go on"))
    assert UserError("no file").fix == "" and isinstance(error, UserError)


@pytest.mark.parametrize(
    ("message", "line"), [("\n  one\ntwo", "one"), ("one", "one"), ("", "ValueError"), (" \n ", "ValueError")]
)
def test_the_first_line_of_an_error_is_its_text_or_its_name(message: str, line: str) -> None:
    assert first_line(ValueError(message)) == line


@given(st.text())
def test_printable_text_has_the_same_letters_but_for_those_that_are_none(text: str) -> None:
    clean = printable(text)
    assert len(clean) == len(text)
    for old, new in zip(text, clean, strict=True):
        assert new == (old if old.isprintable() or old in ("\n", "\t") else "�")


def test_escapes_and_other_controls_are_replaced() -> None:
    assert printable("a\x1b[31mb\r\x00\n\tc") == "a�[31mb��\n\tc"

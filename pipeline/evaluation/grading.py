"""Answers: which one a completion ends in, and whether two are worth the same.

Plain numbers and words are compared here. All else is math-verify's to judge, in a process of its own
(`pipeline.evaluation.verdict`), so that no expression hangs or fills this one, whatever thread asks.
"""

import atexit
import json
import os
import re
import subprocess
import sys
import threading
from decimal import Decimal, InvalidOperation
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from schemas.errors import UserError

LONGEST = 1_000  # characters of an answer; what is longer is none
CPU_SECONDS = 3.0  # of one question; of the processor, so that no verdict depends on how busy the machine is
ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}  # their stacks alone would fill its memory
SIGNIFICANT = 4  # digits of a decimal that stands for all that rounds to it
YES_OR_NO = ("yes", "no", "true", "false")
# Words after a number that say more than what it counts.
NO_UNITS = {
    "hundred",
    "thousand",
    "million",
    "billion",
    "trillion",
    "dozen",
    "or",
    "and",
    "to",
    "plus",
    "minus",
    "times",
}
COUNTED = re.compile(r"(-?[\d,./ ]*\d) (\D+)")
WRAPPED = re.compile(r"\\(?:text|textbf|textit|mathrm|mathbf|mbox)\s*\{([^{}]*)\}")
LABEL = re.compile(r"\(?([A-E])(?:[).:].*)?", re.IGNORECASE | re.DOTALL)  # of a choice, its text after it or not
GROUPED = re.compile(r"[-+]?\d{1,3}(?:,\d{3})+(?:\.\d+)?")
MIXED = re.compile(r"(-?\d+) (\d+)/(\d+)")
REPEATING = re.compile(r"(\d*)\.(\d*)\\overline\{?(\d+)\}?")
BASED = re.compile(r"([0-9A-F]+)_\{?(\d+)\}?")
PERCENT = re.compile(r"\s*(?:\\?%|\bper ?cent\b|\bpercentage\b)$", re.IGNORECASE)
ANSWER_IS = re.compile(r"answer is:?|answer:", re.IGNORECASE)


def same_answer(given: str, gold: str) -> bool:
    """Whether two answers are worth the same; which of them is the right one makes no difference.

    Numbers are equal exactly, but a decimal of four significant digits or more stands for all that rounds to it (0.3333
    for 1/3, not 0.33). With a percent sign 50 % is 50 and 0.5; without one they differ by 100, where the paper's harness
    would take either. Units are not compared. Words go by their letters, whatever the case, a lone A to E by its label.
    What cannot be understood, or takes too long to, is no right answer. Raises UserError if math-verify is missing.
    """
    one, other = cleaned(given), cleaned(gold)
    if not one or not other or max(len(one), len(other)) > LONGEST:
        return False
    if one == other:
        return True
    for word, against in ((one, other), (other, one)):
        if (label := LABEL.fullmatch(word)) and label[1].isupper() and len(word.strip("().:")) == 1:
            beside = LABEL.fullmatch(against)
            return bool(beside) and beside[1].upper() == label[1]
        if word.casefold() in YES_OR_NO:
            return re.split(r"\W", against.casefold(), maxsplit=1)[0] == word.casefold()
    if (based := BASED.fullmatch(one)) and (beside := BASED.fullmatch(other)):
        return based.groups() == beside.groups()
    if is_words(one) and is_words(other):
        return one.casefold() == other.casefold()
    signs = [PERCENT.search(text) is not None for text in (one, other)]
    one, other = (without_unit(PERCENT.sub("", text)) for text in (one, other))
    if signs[0] == signs[1]:
        return same_value(one, other)
    part, whole = (one, other) if signs[0] else (other, one)
    return same_value(part, whole) or same_value(hundredth(part), whole)


def cleaned(text: str) -> str:
    """An answer without what is only its typesetting."""
    text = text.strip().strip("*").strip()
    for start, end in (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]")):
        if text.startswith(start) and text.endswith(end) and len(text) > len(start) + len(end):
            text = text[len(start) : -len(end)]
    text = text.replace("−", "-").replace("{,}", ",").replace(r"\!", "").replace(r"\$", "")
    text = re.sub(r"(?<=\d)\\[,;: ](?=\d{3})", "", text)
    text = WRAPPED.sub(r"\1", text) if not re.search(r"\d", WRAPPED.sub("", text)) else text
    text = text.strip().rstrip(".,;").strip().lstrip("$€£¥")
    return REPEATING.sub(repeated, unmixed(re.sub(r"\s+", " ", text)))


def repeated(decimal: re.Match[str]) -> str:
    """A repeating decimal as a fraction."""
    whole, before, period = decimal.groups()
    numerator = int(whole + before + period) - int(whole + before or "0")
    return f"\\frac{{{numerator}}}{{{'9' * len(period)}{'0' * len(before)}}}"


def is_words(text: str) -> bool:
    """Whether an answer is a word of three letters or more, and nothing but words."""
    return re.fullmatch(r"[^\W\d_]+(?:[ '-][^\W\d_]+)*", text) is not None and max(map(len, text.split())) > 2


def without_unit(text: str) -> str:
    """A number without the words that say what it counts."""
    found = COUNTED.fullmatch(text)
    counted = found and is_words(found[2]) and found[2].split()[0].casefold() not in NO_UNITS
    return unmixed(found[1]) if found and counted else text


def unmixed(text: str) -> str:
    """A mixed number in LaTeX; all else as it is."""
    return MIXED.sub(r"\1\\frac{\2}{\3}", text) if MIXED.fullmatch(text) else text


def number_of(text: str) -> Decimal | None:
    """The number that an answer is as it stands, thousands separated or not; None if it is another kind of answer."""
    try:
        value = Decimal(text.replace(",", "") if GROUPED.fullmatch(text) else text.replace("_", "?"))
    except InvalidOperation:
        return None
    return value if value.is_finite() and abs(value.adjusted()) < LONGEST else None


def hundredth(text: str) -> str:
    """A hundredth of an answer."""
    value = number_of(text)
    return f"({text})/100" if value is None else str(value.scaleb(-2))


def same_value(one: str, other: str) -> bool:
    """Whether two answers without percent signs are worth the same."""
    first, second = number_of(one), number_of(other)
    if first is not None and second is not None:
        return first == second or rounds_to(first, second) or rounds_to(second, first)
    return _judge.ask("same", one, other) is True


def rounds_to(value: Decimal, decimal: Decimal) -> bool:
    """Whether a decimal is a value rounded, and of digits enough to stand for it."""
    exponent = int(decimal.as_tuple().exponent)
    if exponent >= 0 or len(decimal.as_tuple().digits) < SIGNIFICANT:
        return False
    return abs(value - decimal) <= Decimal(5).scaleb(exponent - 1)


def final_answer(text: str) -> str:
    """The answer that a completion ends in; empty if it has none.

    What stands after the first `####` on its line, else in the last `\\boxed{}`, else after the last "answer is" or
    "answer:", else the last formula or number.
    """
    if "####" in text:
        return text.split("####", 1)[1].strip().split("\n")[0].strip()
    if r"\boxed" in text or r"\fbox" in text:
        return boxed(re.split(r"\\boxed|\\fbox", text)[-1])
    if said := ANSWER_IS.split(text)[1:]:
        return re.split(r"\.\s|\n", said[-1].strip(), maxsplit=1)[0].strip().rstrip(".")
    return _judge.ask("last", text[-10 * LONGEST :]) or ""


def boxed(text: str) -> str:
    """What stands between the braces that `text` begins with, or up to the formula's end if it has none."""
    if not text.startswith("{"):
        return text.split("$")[0].strip()
    depth = 0
    for place, letter in enumerate(text):
        depth += (letter == "{") - (letter == "}")
        if depth == 0:
            return text[1:place].strip()
    return text[1:].strip()


class Judge:
    """A process that answers one question after another; one that dies of a question is replaced for the next."""

    def __init__(self, seconds: float = CPU_SECONDS) -> None:
        """`seconds` of CPU time for a question."""
        self.seconds = seconds
        self.process: subprocess.Popen[str] | None = None
        self.owner, self.lock = 0, threading.Lock()

    def ask(self, *question: str) -> Any:
        """What `pipeline.evaluation.verdict` answers; None if it died of the question."""
        with self.lock:
            process = self._running()
            assert process.stdin and process.stdout
            try:
                process.stdin.write(json.dumps(question) + "\n")
                process.stdin.flush()
                answer = process.stdout.readline()
            except OSError:
                answer = ""
            except BaseException:  # interrupted: its answer must not be taken for the next question's
                self.end()
                raise
            if not answer:
                self.end()
            return json.loads(answer) if answer else None

    def _running(self) -> "subprocess.Popen[str]":
        if self.process is None or self.owner != os.getpid():
            if find_spec("math_verify") is None:
                raise UserError("math-verify, which grades answers, is not installed", "pip install 'tokensift[eval]'")
            command = [sys.executable, "-m", "pipeline.evaluation.verdict", str(self.seconds)]
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
                cwd=Path(__file__).resolve().parents[2], encoding="utf-8", env=os.environ | ONE_THREAD,
            )  # fmt: skip
            self.owner = os.getpid()
            assert self.process.stdout
            if not self.process.stdout.readline():  # else every answer would be wrong without a word
                self.end()
                raise UserError("the process that grades answers does not start", f"`{' '.join(command)}` says why")
        return self.process

    def end(self) -> None:
        """Let the process go."""
        if self.process and self.owner == os.getpid():
            self.process.kill()
            self.process.communicate()
        self.process = None


_judge = Judge()
atexit.register(_judge.end)

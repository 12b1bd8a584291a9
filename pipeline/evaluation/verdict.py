"""math-verify in a process of its own: `python -m pipeline.evaluation.verdict SECONDS` answers each JSON line it reads with one.

["same", one, other]: whether two answers are worth the same. ["last", text]: its last formula or number. A question that
takes more than so many seconds of CPU time ends the process, by a signal that no library can hold back: a power of powers is one call
into C. math-verify's own limit is a signal as well, which would reach Python only after that call.
"""

import json
import logging
import re
import resource
import signal
import sys
from dataclasses import replace
from decimal import Decimal
from functools import lru_cache
from typing import Any

from pipeline.evaluation.grading import number_of, rounds_to

MOST_BYTES = 2 << 30  # of address space
DIGITS = 30
DEGREES = re.compile(r"(\\(?:sin|cos|tan|cot|sec|csc)\s*)(\d+)\s*\^\s*\{?\\circ\}?")
VARIABLE = re.compile(r"(?:^|[^a-zA-Z\\ ])[a-zA-Z]$")


def same_value(one: str, other: str) -> bool:
    """Whether two answers are worth the same, whichever comes first."""
    from math_verify import verify
    from sympy import FiniteSet

    values = parsed(one), parsed(other)
    if None in values:
        return False
    for text, value in ((one, values[1]), (other, values[0])):
        decimal = number_of(text)
        if decimal is not None and (near := numeric(value)) is not None and rounds_to(near, decimal):
            return True
    # The library asks whether a given answer fits a gold one, in whose order a list is read: a point's, not a list's.
    listed = [isinstance(value, FiniteSet) for value in values]
    pairs = [values, values[::-1]] if listed[0] == listed[1] else [values[::-1] if listed[0] else values]
    return any(verify(*pair, timeout_seconds=0) for pair in pairs)


@lru_cache(maxsize=64)
def parsed(text: str) -> Any:
    """What math-verify makes of an answer; None if nothing."""
    from math_verify import LatexExtractionConfig, parse
    from sympy import I, Symbol

    config = LatexExtractionConfig()
    if VARIABLE.search(text):  # the library would take 4t for four tons
        config = replace(config, normalization_config=replace(config.normalization_config, units=False))
    text = DEGREES.sub(r"\1{\\frac{\2\\pi}{180}}", text)
    found: list[Any] = parse(f"${text}$", [config], fallback_mode="no_fallback", parsing_timeout=0)
    if not found:
        return None
    i = Symbol("i", real=False)
    return found[0].subs(i, I) if i in found[0].free_symbols else found[0]  # sympy's cache would lose a list's order


def numeric(value: Any) -> Decimal | None:
    """A real number's decimal expansion; None for all that is none."""
    if not getattr(value, "is_number", False) or not value.is_real:
        return None
    return number_of(str(value.evalf(DIGITS)))


def last_expression(text: str) -> str:
    """The last formula or number of a text, as math-verify finds them; empty if there is none."""
    from math_verify import ExprExtractionConfig, LatexExtractionConfig
    from math_verify.parser import get_extraction_regexes

    found = []
    for patterns, _ in get_extraction_regexes([LatexExtractionConfig(), ExprExtractionConfig()]):
        plain = max(priority for _, priority in patterns)
        for pattern, priority in patterns:
            if priority == plain:
                found += [(match.end(), -match.start(), match) for match in pattern.finditer(text)]
    return spelled(max(found, key=lambda item: item[:2])[2]) if found else ""


def spelled(match: Any) -> str:
    """The formula or number of a match of math-verify's patterns, without what stands around it."""
    groups = {name: value for name, value in match.groupdict().items() if value}
    names = [name for name in groups if name == "expr" or "atex" in name or name.startswith(("integer", "decimal"))]
    return "".join(groups[name] for name in (*names, "percent") if name in groups).strip()


QUESTIONS = {"same": same_value, "last": last_expression}


def main(seconds: float) -> None:
    """Answer until nobody asks."""
    resource.setrlimit(resource.RLIMIT_AS, (MOST_BYTES, MOST_BYTES))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the asker's
    logging.disable()
    parsed("x")  # loading takes more than most questions
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    for line in sys.stdin:
        kind, *texts = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, seconds)
        try:
            answer = QUESTIONS[kind](*texts)
        except Exception:  # whatever sympy makes of a text
            answer = None
        signal.setitimer(signal.ITIMER_PROF, 0)
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main(float(sys.argv[1]))

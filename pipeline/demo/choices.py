"""Problems with a right result and three wrong ones, for ranking by likelihood (`pipeline.evaluation.ranking`)."""

import random
import re
from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Any

WHOLE = re.compile(r"[1-9]\d*")  # results that are written as digits and nothing else
SPARE = 2  # problems drawn for each that is wanted: some have other results, or too few wrong ones


def ranked_problems(drawn: Iterable[tuple[int, str, str, str]], count: int, seed: str) -> list[dict[str, Any]]:
    """At most `count` rows {id, template, prompt, choices, right} of drawn (template, prompt, worked answer, result)."""
    pool = [item for item in islice(drawn, SPARE * count) if WHOLE.fullmatch(item[3])]
    results = [item[3] for item in pool]
    rows: list[dict[str, Any]] = []
    for template, prompt, _, result in pool:
        rng = random.Random(f"{seed} {prompt}")
        wrong = distractors(result, results, rng)
        if wrong and len(rows) < count:
            choices = rng.sample([result, *wrong], 1 + len(wrong))
            texts = [f" #### {number}" for number in choices]
            row = {"template": template, "prompt": prompt, "choices": texts, "right": choices.index(result)}
            rows.append({"id": f"choice-{len(rows):04}", **row})
    return rows


def distractors(result: str, others: Sequence[str], rng: random.Random) -> list[str]:
    """Three wrong numbers: a near one, one with neighbouring digits swapped or else a near one, another problem's result.

    All have as many digits as the result, so that no way of counting favours the short. Empty if there are not enough.
    """
    near = {str(int(result) + step) for step in (-10, -2, -1, 1, 2, 10)}
    swapped = {result[:i] + result[i + 1] + result[i] + result[i + 2 :] for i in range(len(result) - 1)}
    chosen: list[str] = []
    for pools in ((near,), (swapped, near), (set(others),)):
        fit = [[n for n in sorted(pool - {result, *chosen}) if fits(n, result)] for pool in pools]
        chosen += [rng.choice(numbers) for numbers in fit if numbers][:1]
    return chosen if len(chosen) == 3 else []


def fits(number: str, result: str) -> bool:
    """Whether a number is written in the way of the result."""
    return len(number) == len(result) and bool(WHOLE.fullmatch(number))

"""The demo's conversations, for fine-tuning: sums and the like solved with a Python tool, in ToRA's format.

reasoning-gym's arithmetic, which the demo's corpora do not hold. A trace is short: the assistant writes one program,
the interpreter's output follows, then it says the answer. Held-out problems are other draws of the same kinds.
"""

import random
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from pipeline.demo.data import ask, intact, put, versions

KINDS: dict[str, dict[str, int]] = {  # two or three short numbers: what a model of a million weights can learn to copy
    "chain_sum": {"max_terms": 3, "max_digits": 2},
    "products": {"max_digits": 2},
    "gcd": {"max_value": 99},
    "lcm": {"max_value": 99},
}
MADE_OF_EACH = 4_000  # draws; some are the same
TRAIN, HELD_OUT = 8_000, 200
RECIPE = 1
WORDS = {
    " Give only the GCD as your final answer.": "",
    " Give only the result as your final answer.": "",
    "State the final answer to the following arithmetic problem: ": "Calculate ",
    "Solve the following multiplication: ": "Calculate ",
    "Greatest Common Divisor (GCD)": "GCD",
    "Least Common Multiple (LCM)": "LCM",
}


def drawn(seed: int) -> Iterator[tuple[str, str, str]]:
    """Distinct (question, program, answer), the kinds in turn."""
    from reasoning_gym import create_dataset

    made = [
        create_dataset(kind, size=MADE_OF_EACH, seed=seed * len(KINDS) + number, **sizes)
        for number, (kind, sizes) in enumerate(KINDS.items())
    ]
    seen = set[str]()
    for index in range(MADE_OF_EACH):
        for kind, dataset in zip(KINDS, made, strict=True):
            item: Any = dataset[index]
            question = item["question"]
            for words, other in WORDS.items():
                question = question.replace(words, other)
            question = question.removesuffix(" =").rstrip(".") + "."
            if question not in seen:
                seen.add(question)
                yield question, program(kind, item["metadata"]), str(item["answer"])


def program(kind: str, facts: dict[str, Any]) -> str:
    """Python that prints the answer. A space before each number: so it has the tokens that it has in the question."""
    if "expression" in facts:
        return f"print( {facts['expression']})"
    return f"import math\nprint(math.{kind}( {', '.join(map(str, facts['numbers']))}))"


def conversation(question: str, code: str, answer: str) -> list[dict[str, str]]:
    """A question and its trace."""
    trace = f"```python\n{code}\n```\n```output\n{answer}\n```\nThe answer is {answer}."
    return [{"role": "user", "content": question}, {"role": "assistant", "content": trace}]


def build(folder: Path, seed: int = 0, scale: float = 1.0) -> dict[str, Any]:
    """Make conversations and held-out problems in `folder` unless they are there and intact; returns the manifest.

    Raises UserError on a foreign folder.
    """
    made = {"recipe": RECIPE, "seed": seed, "scale": scale, "sources": versions()}
    if manifest := intact(folder, made):
        return manifest
    train, held = (max(20, round(count * scale)) for count in (TRAIN, HELD_OUT))
    items = list(islice(drawn(seed), train + held))
    random.Random(seed).shuffle(items)
    talks = [{"id": f"chat-{i:05}", "messages": conversation(*item)} for i, item in enumerate(items)]
    problems = [{"prompt": ask(question), "answer": answer} for question, _, answer in items[:held]]
    rows = {
        "train/chats.jsonl.zst": talks[held:],
        "heldout/conversations.jsonl": talks[:held],
        "heldout/problems.jsonl": problems,
    }
    return put(folder, rows, made)

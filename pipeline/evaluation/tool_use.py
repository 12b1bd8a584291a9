"""Answers with a Python tool, in ToRA's format as the paper's harness ran it.

The model writes text and a ```python block; where it would write "```output" the block is run in the sandbox, what it
printed is put there, and the model goes on. As in ToRA each block is a program by itself in a fresh process: it does
not see the variables of those before it. An answer ends when the model ends without a new program, says a `\\boxed{}`,
or has gone on `rounds` times.
"""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from pipeline.evaluation.generate import Generator
from pipeline.evaluation.grading import final_answer
from pipeline.evaluation.sandbox import Outcome, Sandbox

OUTPUT = "```output"
STOPS = (OUTPUT, "\n\n---")  # after the second, examples of a prompt go on with the next one
MOST_OUTPUT = 400  # characters of an output that the model is shown: its beginning and its end
ROUNDS = 4


@dataclass
class Answer:
    """What was written after a prompt: the model's words, and outputs between them.

    text: both, in order. said: the model's words since the last output. shown: the outputs as the model saw them.
    rounds: how many times the model wrote.
    """

    prompt: str
    text: str = ""
    said: str = ""
    shown: list[str] = field(default_factory=list[str])
    outcomes: list[Outcome] = field(default_factory=list[Outcome])
    rounds: int = 0

    def final(self) -> str:
        """The answer: what the model's last words end in, or if they hold none, what its last program printed."""
        last = final_answer(self.said) if program_of(self.said) is None else ""
        return last or (final_answer(self.shown[-1]) if self.shown else "")

    def ran(self) -> bool:
        """Whether there was a program, and the last one ended without an error."""
        return bool(self.outcomes) and self.outcomes[-1].ok


def solve(
    generator: Generator,
    sandbox: Sandbox,
    prompts: list[str],
    new_tokens: int,
    rounds: int = ROUNDS,
    stop: Sequence[str] = (),
) -> list[Answer]:
    """Answer prompts side by side; `new_tokens` a round, programs of a round on all cores. `stop` ends an answer too."""
    answers = [Answer(prompt) for prompt in prompts]
    going = answers
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        for _ in range(rounds):
            texts = generator.complete([one.prompt + one.text for one in going], [*STOPS, *stop], new_tokens)
            programs: list[tuple[Answer, str]] = []
            for one, text in zip(going, texts, strict=True):
                one.said = text.rstrip()
                one.text += one.said
                one.rounds += 1
                if (program := program_of(one.said)) is not None:
                    programs.append((one, program))
            for (one, _), outcome in zip(programs, pool.map(lambda pair: sandbox.run(pair[1]), programs), strict=True):
                one.outcomes.append(outcome)
                one.shown.append(shown(outcome))
                one.text += f"\n{OUTPUT}\n{one.shown[-1]}\n```\n"
            going = [one for one, _ in programs]
            if not going:
                break
    return answers


def program_of(said: str) -> str | None:
    """The last program in the model's words, if they end with one and call no answer final; else None."""
    if not said.endswith("```") or "\\boxed" in said:
        return None
    lines, inside, found = [], False, False
    for line in said.split("\n"):
        if line.lstrip().startswith("```python"):  # an answer may begin with a space
            lines, inside, found = [], True, True
        elif line.startswith("```"):
            inside = False
        elif inside:
            lines.append(line)
    return "\n".join(lines) + "\n" if found and not inside else None


def shown(outcome: Outcome) -> str:
    """What the model is told of a program: what it printed, or the last line of its error."""
    if outcome.ok:
        text = outcome.stdout.strip() or "Done"
    elif outcome.reason == "time":
        text = "Timeout Error"
    else:
        text = (outcome.stderr.strip().splitlines() or [f"Error: {outcome.reason}"])[-1]
    half = MOST_OUTPUT // 2
    return text if len(text) <= MOST_OUTPUT else f"{text[:half]}...{text[-half:]}"

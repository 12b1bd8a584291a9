"""A profile holds the steps of its window and no others, on every rank, and costs nothing outside it."""

import gzip
import json
import re

import pytest
import torch

from pipeline.cli import read_steps
from schemas.config import Train
from schemas.errors import UserError
from trainer.profiler import Profiler
from trainer.ranks import Ranks


def steps_in(path):
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    names = [event["name"] for event in events if event.get("cat") in ("user_annotation", "cpu_op")]
    marks = sorted({int(name[5:]) for name in names if re.fullmatch(r"step \d+", name)})
    return marks, sum(name.startswith("Optimizer.step") for name in names), "aten::embedding" in names


def test_a_profile_holds_the_steps_of_its_window_and_no_others(scores, tmp_path, train_here):
    plain = train_here(scores, epochs=0.5, output=tmp_path / "plain")[1]
    _, rows = train_here(scores, epochs=0.5, output=tmp_path / "traced", profile=(2, 4))
    assert [row["loss_all"] for row in rows] == [row["loss_all"] for row in plain]
    (trace,) = (tmp_path / "traced").rglob("*.json.gz")
    assert trace.relative_to(tmp_path / "traced" / "profile").as_posix() == "steps-2-4/rank-00000.json.gz"
    assert steps_in(trace) == ([2, 3], 2, True)
    assert not (tmp_path / "plain" / "profile").exists()


@pytest.mark.parametrize(("begins", "ends", "held"), [(1, 3, [2]), (3, 9, [3, 4]), (5, 9, None)])
def test_a_run_that_begins_or_ends_within_a_window_traces_what_it_has_of_it(tmp_path, begins, ends, held):
    with Profiler(tmp_path, (2, 5), Ranks(3, 4, torch.device("cpu"))) as profiler:
        for step in range(begins, ends):
            profiler.at(step)
            torch.ones(2, 2) @ torch.ones(2, 2)
    traces = list(tmp_path.rglob("*.json.gz"))
    assert [path.name for path in traces] == (["rank-00003.json.gz"] if held else [])
    if held:
        assert steps_in(traces[0])[0] == held


def test_a_window_is_steps_from_and_to():
    assert (read_steps("10:13"), read_steps(None)) == ([10, 13], None)
    for text in ("10", "10:", "a:b", ":", "-1:3"):
        with pytest.raises(UserError, match=f"--profile {text}: is not from:to"):
            read_steps(text)
    assert Train(output="x", epochs=1, profile=[10, 13]).profile == (10, 13)
    for steps in ([3, 3], [0, 2], [5, 4]):
        with pytest.raises(ValueError, match="the first step"):
            Train(output="x", epochs=1, profile=steps)

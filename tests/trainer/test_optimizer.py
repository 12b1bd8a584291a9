"""The rates against a table worked out by hand, and AdamW against its paper, one number at a time."""

import math

import pytest
import torch

from schemas.config import Train
from trainer.optimizer import adamw, learning_rate

# Learning rate 2, warm-up over the first tenth; the floor is a quarter of it in the second column, none in the first.
RATES = {
    ("cosine", 0.0): (0.0, 0.0),
    ("cosine", 0.05): (1.0, 1.0),
    ("cosine", 0.1): (2.0, 2.0),
    ("cosine", 0.4): (1.5, 1.625),  # a third of the way: (1 + cos 60 degrees) / 2 = 3/4
    ("cosine", 0.55): (1.0, 1.25),
    ("cosine", 0.7): (0.5, 0.875),
    ("cosine", 1.0): (0.0, 0.5),
    ("wsd", 0.05): (1.0, 1.0),
    ("wsd", 0.1): (2.0, 2.0),
    ("wsd", 0.6): (2.0, 2.0),
    ("wsd", 0.7): (1.5, 1.625),  # it decays over the last 0.4
    ("wsd", 0.9): (0.5, 0.875),
    ("wsd", 1.0): (0.0, 0.5),
    ("constant", 0.05): (1.0, 1.0),
    ("constant", 0.1): (2.0, 2.0),
    ("constant", 0.7): (2.0, 2.0),
    ("constant", 1.0): (2.0, 2.0),
}


@pytest.mark.parametrize("schedule", ["cosine", "wsd", "constant"])
@pytest.mark.parametrize(("floor", "column"), [(0.0, 0), (0.25, 1)])
def test_a_rate_is_the_one_worked_out_by_hand(schedule, floor, column):
    config = Train(
        output="x", epochs=1, learning_rate=2.0, warmup=0.1, schedule=schedule, decay=0.4, min_learning_rate_ratio=floor
    )
    for (name, done), rates in RATES.items():
        if name == schedule:
            assert learning_rate(config, done) == pytest.approx(rates[column], abs=1e-12), done


@pytest.mark.parametrize("schedule", ["cosine", "wsd", "constant"])
def test_without_a_warm_up_a_run_starts_at_its_full_rate(schedule):
    config = Train(output="x", epochs=1, learning_rate=2.0, warmup=0.0, schedule=schedule)
    assert learning_rate(config, 0.0) == 2.0


def test_two_steps_of_adamw_are_those_of_its_paper_and_matrices_alone_decay():
    config = Train(output="x", epochs=1, learning_rate=0.1, betas=(0.5, 0.75), weight_decay=0.3)
    parameters = [torch.nn.Parameter(torch.full(shape, 2.0)) for shape in [(1,), (1, 1), (1, 1, 1)]]
    optimizer = adamw(iter(parameters), config)
    values, first, second = [2.0] * 3, 0.0, 0.0
    for step, gradient in enumerate([3.0, -1.0], 1):
        first, second = 0.5 * first + 0.5 * gradient, 0.75 * second + 0.25 * gradient**2
        move = first / (1 - 0.5**step) / (math.sqrt(second / (1 - 0.75**step)) + 1e-8)
        decays = [0.0, 0.3, 0.3]
        values = [value - 0.1 * (decay * value + move) for value, decay in zip(values, decays, strict=True)]
        for parameter in parameters:
            parameter.grad = torch.full_like(parameter, gradient)
        optimizer.step()
        assert [parameter.item() for parameter in parameters] == pytest.approx(values, rel=1e-6)

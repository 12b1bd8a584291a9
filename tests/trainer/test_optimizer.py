import pytest

from schemas.config import Train
from trainer.optimizer import learning_rate


def settings(**fields):
    return Train(output="x", epochs=1, learning_rate=1.0, warmup=0.1, **fields)


@pytest.mark.parametrize("schedule", ["cosine", "wsd"])
def test_the_schedule_rises_linearly_and_is_fully_decayed_at_the_end(schedule):
    config = settings(schedule=schedule)
    assert learning_rate(config, 0.05) == pytest.approx(0.5)
    assert learning_rate(config, 0.1) == pytest.approx(1.0)
    assert learning_rate(config, 1.0) == pytest.approx(0.0)


def test_wsd_is_stable_until_it_decays():
    config = settings(schedule="wsd", decay=0.2)
    assert learning_rate(config, 0.79) == pytest.approx(1.0)
    assert learning_rate(config, 0.9) == pytest.approx(0.5)


def test_the_floor_is_kept():
    assert learning_rate(settings(min_learning_rate_ratio=0.1), 1.0) == pytest.approx(0.1)

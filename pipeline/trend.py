"""Token dynamics: how single tokens' losses move over a run's checkpoints (Rho-1, section 2.1 and appendix D). Pure functions.

Losses are float arrays [checkpoints, tokens] in nats, without NaN.
"""

import numpy as np

CATEGORIES = ("H→H", "L→H", "H→L", "L→L")  # from high or low loss to high or low
PAPER = {"H→H": 0.11, "L→H": 0.12, "H→L": 0.26, "L→L": 0.51}  # TinyLlama on 15B tokens of OpenWebMath
LEAST_CHANGE = 0.2  # nats


def changes(losses: np.ndarray) -> np.ndarray:
    """End minus start of the least-squares line through each token's losses at x = 0, 1 ... n: [tokens], nats.

    The line's slope is sum((x - mean x) * loss) / sum((x - mean x)^2), the change is n times that.
    """
    count = len(losses)
    x = np.arange(count) - (count - 1) / 2
    return (count - 1) * (x @ losses.astype(np.float64)) / (x @ x)


def categories(losses: np.ndarray) -> np.ndarray:
    """Each token's index in CATEGORIES: [tokens], int8.

    A fitted change below -0.2 nats is H→L, above 0.2 L→H. Of the others a token whose last loss is at most the mean of all
    tokens' last losses is L→L, else H→H.
    """
    change, last = changes(losses), losses[-1].astype(np.float64)
    still = np.where(last <= last.mean(), CATEGORIES.index("L→L"), CATEGORIES.index("H→H"))
    moved = np.where(change > LEAST_CHANGE, CATEGORIES.index("L→H"), still)
    return np.where(change < -LEAST_CHANGE, CATEGORIES.index("H→L"), moved).astype(np.int8)


def means_by(values: np.ndarray, category: np.ndarray, count: int = len(CATEGORIES)) -> np.ndarray:
    """Means of `values` [..., tokens] over the tokens of each of `count` categories: [count, ...]; NaN for one without tokens."""
    groups = [values[..., category == number] for number in range(count)]
    empty = np.full(values.shape[:-1], np.nan)
    return np.stack([group.mean(-1, dtype=np.float64) if group.shape[-1] else empty for group in groups])


def agreement(kept: np.ndarray) -> np.ndarray:
    """Of the tokens kept at checkpoint i, the share that is also kept at checkpoint j: [checkpoints, checkpoints].

    Two random choices would agree in the share that is kept.
    """
    numbers = kept.astype(np.float64)
    return numbers @ numbers.T / np.maximum(numbers.sum(1), 1)[:, None]

"""DAPO's (arXiv:2503.14476) two rules about samples: which groups teach something, and what over-long answers cost."""

import numpy as np


def informative(metric: np.ndarray, uids: np.ndarray) -> np.ndarray:
    """Samples whose group differs within itself in `metric` (equation 11): [N] numbers, [N] uids -> bool [N].

    A group in which all agree has no advantage. A NaN (a sample that could not be scored) counts as 0.
    """
    values = np.nan_to_num(np.asarray(metric, dtype=np.float64))
    _, group = np.unique(uids, return_inverse=True)
    top, bottom = np.full(group.max(initial=-1) + 1, -np.inf), np.full(group.max(initial=-1) + 1, np.inf)
    np.maximum.at(top, group, values)
    np.minimum.at(bottom, group, values)
    return (top > bottom)[group]


def overlong_penalty(lengths: np.ndarray, max_length: int, buffer: int, factor: float) -> np.ndarray:
    """Soft over-long punishment (equation 13): response lengths [N] in tokens -> float32 [N], at most 0.

    0 up to max_length - buffer, then falling in a line to -factor at max_length.
    """
    over = np.asarray(lengths, dtype=np.float64) - (max_length - buffer)
    return (-factor * np.clip(over / buffer, 0.0, 1.0)).astype(np.float32)

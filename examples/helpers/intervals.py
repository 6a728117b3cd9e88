"""Confidence intervals of means over seeds."""

import math

import numpy as np
import scipy.stats


def half_interval(values: np.ndarray | list[float]) -> float:
    """Half the width of the 95 % interval of the mean (Student's t); infinite for one value."""
    if len(values) < 2:
        return math.inf
    return float(scipy.stats.t.ppf(0.975, len(values) - 1) * scipy.stats.sem(values))

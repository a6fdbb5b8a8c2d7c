"""The logistic function of quality: a MOS from 1 to 5 is `1 + 4 * sigmoid(logit)`."""

import numpy as np


def sigmoid(logits: np.ndarray) -> np.ndarray:
    """Return 1 / (1 + exp(-logit)) in float64, accurate at both ends.

    Labels on disk come from this formula. `1 / (1 + np.exp(-x))` and scipy's `expit` differ from it in the last bit.
    """
    return np.exp(-np.logaddexp(0.0, -np.asarray(logits, np.float64)))


def logits(mos: np.ndarray | float, margin: float) -> np.ndarray:
    """Return the logits of MOS from 1 to 5 in float64.

    1 and 5 have no logit: a score nearer to an end than the share `margin` of the range is moved to that distance.
    """
    quality = np.clip((np.asarray(mos, np.float64) - 1) / 4, margin, 1 - margin)
    return np.asarray(np.log(quality) - np.log1p(-quality))

"""TSOS: the known answers of the specification, on speech with pauses."""

import numpy as np
import pytest

from manifests import voice
from speechdistill.metrics.oversuppression import oversuppression

CLEAN = voice(8.0, seed=3)


@pytest.mark.parametrize("gain", [0.5, 1.0, 2.0])
def test_moderate_gains_and_added_noise_suppress_nothing(gain: float) -> None:
    noise = 0.01 * np.random.default_rng(0).standard_normal(len(CLEAN))
    for estimate in (gain * CLEAN, CLEAN + noise):
        assert oversuppression(CLEAN, estimate) == (0, 0)


def test_zeros_suppress_every_frame_and_a_silent_reference_none() -> None:
    zeros = np.zeros_like(CLEAN)
    assert oversuppression(CLEAN, zeros) == (1, 1)
    assert oversuppression(zeros, CLEAN) == (0, 0)


def test_a_quarter_that_is_zeroed_is_a_quarter_of_the_frames() -> None:
    estimate = CLEAN.copy()
    estimate[: len(CLEAN) // 4] = 0
    found = oversuppression(CLEAN, estimate)
    assert found.share == pytest.approx(0.25, abs=0.01) and found.level_free == pytest.approx(0.25, abs=0.01)
    assert found.seconds_per_half_hour == pytest.approx(1800 * found.share)


def test_the_published_form_depends_on_the_level_and_is_taken_at_the_references() -> None:
    """Below 11.0 dB of attenuation no frame counts in the form without levels, beyond it every one."""
    assert oversuppression(CLEAN, 0.25 * CLEAN).share < 0.3 < oversuppression(CLEAN, 0.1 * CLEAN).share
    assert oversuppression(CLEAN, 0.25 * CLEAN) == oversuppression(0.1 * CLEAN, 0.025 * CLEAN)
    assert oversuppression(CLEAN, 10 ** (-10.9 / 20) * CLEAN).level_free == 0
    assert oversuppression(CLEAN, 10 ** (-11.1 / 20) * CLEAN).level_free == 1


def test_waves_of_other_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(num_samples,\) twice"):
        oversuppression(CLEAN, CLEAN[1:])

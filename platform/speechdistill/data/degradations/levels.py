"""Levels: clipped recordings and changing loudness."""

from dataclasses import dataclass

import numpy as np
from scipy.ndimage import uniform_filter1d

from speechdistill.data.degradation import Component, Scene
from speechdistill.io import audio

_RAMP = audio.SAMPLE_RATE // 50  # changes are 20 ms ramps, which do not click
_OVER_DB = (3.0, 20.0)
_CHANGES = (1, 4)
_GAIN_DB = (-20.0, 10.0)


@dataclass(frozen=True)
class Clipping:
    """Clip the wave at `over_db` below its peak, like an overdriven converter."""

    over_db: float

    def apply(self, wave: np.ndarray) -> np.ndarray:
        most = np.abs(wave).max(initial=0.0) * np.float32(10 ** (-self.over_db / 20))
        return np.asarray(np.clip(wave, -most, most), np.float32)

    def clip_ids(self) -> tuple[str, ...]:
        return ()


@dataclass(frozen=True)
class LevelChanges:
    """Gains by position: each of `changes` is (first sample, gain in dB) and holds until the next.

    The level before the first change is kept.
    """

    changes: tuple[tuple[int, float], ...]

    def apply(self, wave: np.ndarray) -> np.ndarray:
        gain_db = np.zeros(len(wave))
        for start, value in self.changes:
            gain_db[start:] = value
        return np.asarray(wave * 10 ** (uniform_filter1d(gain_db, _RAMP, mode="nearest") / 20), np.float32)

    def clip_ids(self) -> tuple[str, ...]:
        return ()


def _draw_clipping(rng: np.random.Generator, scene: Scene) -> Clipping:
    """Draw clipping at 3 to 20 dB below the peak, uniformly."""
    return Clipping(float(rng.uniform(*_OVER_DB)))


def _draw_level_changes(rng: np.random.Generator, scene: Scene) -> LevelChanges:
    """Draw 1 to 4 changes anywhere in the segment, to gains of -20 to 10 dB, all uniform."""
    count = int(rng.integers(*_CHANGES, endpoint=True))
    starts = np.sort(rng.integers(scene.num_samples, size=count)).tolist()
    return LevelChanges(tuple(zip(starts, rng.uniform(*_GAIN_DB, size=count).tolist(), strict=True)))


clipping = Component(_draw_clipping, Clipping)
level_changes = Component(_draw_level_changes, LevelChanges)

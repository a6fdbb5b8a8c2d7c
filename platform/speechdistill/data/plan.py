"""What sample i is: a pure function of (recipe, clips, seed, i) that opens no audio.

A recipe lists stages in order; each stage draws one of its components, or none. The recipes that there are stand in
`degradation_recipes.py`.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, lru_cache
from typing import Any

import numpy as np

from speechdistill.data import components, degradation
from speechdistill.data.clips import Clip, Clips
from speechdistill.data.degradation import Scene, Step
from speechdistill.io.assets import Asset
from speechdistill.io.audio import SAMPLE_RATE, SEGMENT_S
from speechdistill.io.errors import UserError


@dataclass(frozen=True)
class RecipeStage:
    """One draw: `odds` maps components to probabilities, what is left is the stage's 'none'.

    A stage that `ends` leaves the sample as it is once one of its components was drawn.
    """

    name: str
    odds: Mapping[str, float]
    ends: bool = False

    def none(self) -> float:
        return 1.0 - sum(self.odds.values())


@dataclass(frozen=True)
class DegradationRecipe:
    """How speech is degraded before it is labelled.

    `snr_sigma_db` is 10, or √10 where the paper's "variance 10 dB" is read literally. `whole_files` covers every
    clip with segments in manifest order; otherwise each sample is one segment drawn from one clip. `assets` are what
    its components need beside the code, by name.
    """

    name: str
    stages: tuple[RecipeStage, ...] = ()
    segment_s: float = SEGMENT_S
    snr_mean_db: float = 10.0
    snr_sigma_db: float = 10.0
    whole_files: bool = False
    assets: Mapping[str, Asset] = field(default_factory=dict)

    @property
    def components(self) -> list[str]:
        """The names of all components, in order."""
        return [name for stage in self.stages for name in stage.odds]

    @property
    def segment_samples(self) -> int:
        return round(self.segment_s * SAMPLE_RATE)


@dataclass(frozen=True)
class Plan:
    """One sample: a segment of a speech clip (samples at 16 kHz) and the steps applied to it, in order."""

    recipe: str
    seed: int
    sample_id: int
    clip_id: str
    uri: str
    speaker: str | None
    start: int
    num_samples: int
    steps: tuple[Step, ...] = ()

    @property
    def is_generated(self) -> bool:
        """Whether its first step makes its speech; then the clip is not in it."""
        return bool(self.steps) and degradation.generates(self.steps[0])

    @property
    def clip_ids(self) -> list[str]:
        own = [] if self.is_generated else [self.clip_id]
        return [*own, *(clip_id for step in self.steps for clip_id in step.clip_ids())]

    def to_json(self) -> str:
        steps = [components.to_json(step) for step in self.steps]
        return json.dumps({**asdict(replace(self, steps=())), "steps": steps}, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> "Plan":
        values: dict[str, Any] = json.loads(text)
        steps = tuple(components.from_json(step) for step in values.pop("steps"))
        return cls(**values, steps=steps)


class Plans:
    """The plans of a run: `plans[i]` for any i ≥ 0 (below `len` where the recipe covers whole files).

    Clips follow a seeded permutation, a new one each time all were used, so `len(plans)` samples use every clip
    once (or every segment of every clip) and a larger number only adds samples.
    """

    def __init__(self, recipe: DegradationRecipe, clips: Clips, seed: int) -> None:
        if seed < 0:
            raise UserError(f"seed {seed}", "give at least 0")
        if recipe.segment_samples <= 0:
            raise UserError(f"segments of {recipe.segment_s} s are too short", f"the student's are {SEGMENT_S} s")
        if not len(clips.speech):
            raise UserError("the manifest has no speech clips", "ingest some with --speech DIR")
        self._recipe, self._clips, self._seed = recipe, clips, seed
        scene = self._scene(clips.speech[0], recipe.segment_samples)
        for name in recipe.components:  # what cannot be drawn, for want of texts, is told now
            components.component(name)(np.random.default_rng(0), scene)

    def __len__(self) -> int:
        return int(self._ends[-1]) if self._recipe.whole_files else len(self._clips.speech)

    def __getitem__(self, sample_id: int) -> Plan:
        if sample_id < 0 or (self._recipe.whole_files and sample_id >= len(self)):
            raise IndexError(f"sample {sample_id} does not exist; there are {len(self)}")
        if self._recipe.whole_files:
            return self._covered(sample_id)
        return self._drawn(sample_id)

    def clip(self, sample_id: int) -> Clip:
        """The speech clip of a sample."""
        if self._recipe.whole_files:
            return self._clips.speech[int(np.searchsorted(self._ends, sample_id, side="right"))]
        epoch, position = divmod(sample_id, len(self._clips.speech))
        return self._clips.speech[int(_permutation(self._seed, epoch, len(self._clips.speech))[position])]

    @cached_property
    def _ends(self) -> np.ndarray:
        """Number of segments up to and including each clip."""
        return np.cumsum(-(-self._clips.speech.num_samples // self._recipe.segment_samples))

    def _covered(self, sample_id: int) -> Plan:
        index = int(np.searchsorted(self._ends, sample_id, side="right"))
        clip, segment = self._clips.speech[index], self._recipe.segment_samples
        count = -(-clip.num_samples // segment)
        number = sample_id - (int(self._ends[index]) - count)
        # Evenly spaced from start to end, as the released model cuts long files: no short remainder is scored.
        start = number * max(0, clip.num_samples - segment) // max(1, count - 1)
        length = min(segment, clip.num_samples)
        return self._plan(sample_id, clip, start, length, ())

    def _drawn(self, sample_id: int) -> Plan:
        clip = self.clip(sample_id)
        rng = np.random.default_rng(np.random.SeedSequence(self._seed, spawn_key=(1, sample_id)))
        length = min(self._recipe.segment_samples, clip.num_samples)
        start = int(rng.integers(0, clip.num_samples - length, endpoint=True))
        return self._plan(sample_id, clip, start, length, _steps(self._recipe, rng, self._scene(clip, length)))

    def _scene(self, clip: Clip, length: int) -> Scene:
        numbers = self._recipe.snr_mean_db, self._recipe.snr_sigma_db
        return Scene(clip.clip_id, clip.speaker, length, self._clips, *numbers, self._recipe.assets)

    def _plan(self, sample_id: int, clip: Any, start: int, length: int, steps: tuple[Step, ...]) -> Plan:
        return Plan(
            self._recipe.name,
            self._seed,
            sample_id,
            clip.clip_id,
            clip.uri,
            clip.speaker,
            start,
            length,
            steps,
        )


def _steps(recipe: DegradationRecipe, rng: np.random.Generator, scene: Scene) -> tuple[Step, ...]:
    steps = []
    for stage, u in zip(recipe.stages, rng.random(len(recipe.stages)), strict=True):
        name = _chosen(stage.odds, u)
        if name is not None:
            steps.append(components.component(name)(rng, scene))
            if stage.ends:
                break
    return tuple(steps)


def _chosen(odds: Mapping[str, float], u: float) -> str | None:
    for name, probability in odds.items():
        if u < probability:
            return name
        u -= probability
    return None


@lru_cache(maxsize=2)  # a run walks through the epochs in order
def _permutation(seed: int, epoch: int, length: int) -> np.ndarray:
    # In half the memory of `permutation(length)`, whose order it is: each worker has its own.
    order = np.arange(length, dtype=np.uint32)
    np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(0, epoch))).shuffle(order)
    return order

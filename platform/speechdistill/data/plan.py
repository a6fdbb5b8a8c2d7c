"""Plans: sample i as a pure function of (recipe, clips, seed, i), which opens no audio.

A recipe lists stages in order; each stage draws one of its components, or none. `degradation_recipes.py` has the
recipes.
"""

import json
from collections.abc import Mapping
from dataclasses import KW_ONLY, asdict, dataclass, field, replace
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
    """One draw: `odds` maps components to probabilities, and 'none' has the rest.

    If a component of a stage with `ends` is drawn, no further stage follows.
    """

    name: str
    odds: Mapping[str, float]
    _: KW_ONLY
    ends: bool = False

    def none(self) -> float:
        return 1.0 - sum(self.odds.values())


@dataclass(frozen=True)
class DegradationRecipe:
    """Degradation of speech before labelling.

    `snr_sigma_db` is 10, or √10 if the paper's "variance 10 dB" is read literally. `whole_files` covers every clip with
    segments in manifest order; otherwise each sample is one segment drawn from one clip. `assets` are the weights and
    texts of the components, by name.
    """

    name: str
    stages: tuple[RecipeStage, ...] = ()
    _: KW_ONLY
    segment_s: float = SEGMENT_S
    snr_mean_db: float = 10.0
    snr_sigma_db: float = 10.0
    whole_files: bool = False
    assets: Mapping[str, Asset] = field(default_factory=dict)

    @property
    def components(self) -> list[str]:
        """Names of all components, in order."""
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
        """Whether the first step generates the speech, so that the clip is not used."""
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
    """Plans of a run: `plans[i]` for any i ≥ 0 (below `len` if the recipe covers whole files).

    Clips follow a seeded permutation, with a new one for each pass, so `len(plans)` samples use every clip once (or
    every segment of every clip), and a larger number only adds samples.
    """

    def __init__(self, recipe: DegradationRecipe, clips: Clips, seed: int) -> None:
        if seed < 0:
            raise UserError(f"seed {seed} is negative", "give at least 0")
        if recipe.segment_samples <= 0:
            raise UserError(
                f"segments of {recipe.segment_s} s are too short",
                f"the student's input is {SEGMENT_S} s",
            )
        if not len(clips.speech):
            raise UserError("the manifest has no speech clips", "ingest some with --speech DIR")
        self._recipe, self._clips, self._seed = recipe, clips, seed
        scene = self._scene(clips.speech[0], recipe.segment_samples)
        for name in recipe.components:  # raises now if a component lacks its texts
            components.component(name).draw(np.random.default_rng(0), scene)

    def __len__(self) -> int:
        return int(self._ends[-1]) if self._recipe.whole_files else len(self._clips.speech)

    def __getitem__(self, sample_id: int) -> Plan:
        if sample_id < 0 or (self._recipe.whole_files and sample_id >= len(self)):
            raise IndexError(f"sample {sample_id} does not exist; there are {len(self)}")
        if self._recipe.whole_files:
            return self._covered(sample_id)
        return self._drawn(sample_id)

    def clip(self, sample_id: int) -> Clip:
        """Return the speech clip of a sample."""
        if self._recipe.whole_files:
            return self._clips.speech[int(np.searchsorted(self._ends, sample_id, side="right"))]
        epoch, position = divmod(sample_id, len(self._clips.speech))
        return self._clips.speech[int(_permutation(self._seed, epoch, len(self._clips.speech))[position])]

    @cached_property
    def _ends(self) -> np.ndarray:
        """Number of segments up to and including each clip, shape (clips,)."""
        return np.cumsum(-(-self._clips.speech.num_samples // self._recipe.segment_samples))

    def _covered(self, sample_id: int) -> Plan:
        index = int(np.searchsorted(self._ends, sample_id, side="right"))
        clip, segment = self._clips.speech[index], self._recipe.segment_samples
        count = -(-clip.num_samples // segment)
        number = sample_id - (int(self._ends[index]) - count)
        # Evenly spaced from start to end, like the released model, so that no short remainder is scored.
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
        return Scene(
            clip.clip_id,
            clip.speaker,
            length,
            self._clips,
            snr_mean_db=self._recipe.snr_mean_db,
            snr_sigma_db=self._recipe.snr_sigma_db,
            assets=self._recipe.assets,
        )

    def _plan(self, sample_id: int, clip: Clip, start: int, length: int, steps: tuple[Step, ...]) -> Plan:
        return Plan(
            recipe=self._recipe.name,
            seed=self._seed,
            sample_id=sample_id,
            clip_id=clip.clip_id,
            uri=clip.uri,
            speaker=clip.speaker,
            start=start,
            num_samples=length,
            steps=steps,
        )


def _steps(recipe: DegradationRecipe, rng: np.random.Generator, scene: Scene) -> tuple[Step, ...]:
    steps = []
    for stage, u in zip(recipe.stages, rng.random(len(recipe.stages)), strict=True):
        name = _chosen(stage.odds, u)
        if name is not None:
            steps.append(components.component(name).draw(rng, scene))
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
    # Same order as `permutation(length)` in half the memory, which each worker has to itself.
    order = np.arange(length, dtype=np.uint32)
    np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(0, epoch))).shuffle(order)
    return order

"""What sample i is: a pure function of (recipe, clips, seed, i) that opens no audio.

A recipe lists stages in order; each stage draws one of its components, or none. Probabilities and order are those
of Distill-MOS, section IV-B.
"""

import json
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, lru_cache
from typing import Any, Literal

import numpy as np

from speechdistill import assets, degradations
from speechdistill.assets import Asset, MissingError
from speechdistill.audio import SAMPLE_RATE
from speechdistill.clips import Clip, Clips
from speechdistill.degradations import Scene, Step

SEGMENT_S = 7.68
"""The student's input and the teacher's centre crop: 384 frames of 20 ms."""

WEIGHTS_FREE = (
    "rooms.room",
    "noise.noise",
    "denoisers.spectral_gating",
    "codecs.opus",
    "codecs.band_limit",
)
"""The paper's components that need no trained weights."""


@dataclass(frozen=True)
class Stage:
    """One draw: `odds` maps components to probabilities, what is left is the stage's 'none'.

    A stage that `ends` leaves the sample as it is once one of its components was drawn.
    """

    name: str
    odds: Mapping[str, float]
    ends: bool = False

    def none(self) -> float:
        return 1.0 - sum(self.odds.values())


@dataclass(frozen=True)
class Recipe:
    """How speech is degraded before it is labelled.

    `snr_sigma_db` is 10, or √10 where the paper's "variance 10 dB" is read literally. `whole_files` covers every
    clip with segments in manifest order; otherwise each sample is one segment drawn from one clip. `assets` are what
    its components need beside the code, by name (`with_assets`).
    """

    name: str
    stages: tuple[Stage, ...] = ()
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


def paper(lpcnet: bool = False) -> Recipe:
    """The recipe of Distill-MOS, section IV-B.

    The paper's second vocoder, LPCNet on features that are not quantised, is not to be had as a library: with `lpcnet`
    the codec of libcodec2 stands for it, which is harsher; without it HiFi-GAN has the probability of both.
    """
    vocoders = ["vocoders.hifigan", *(["vocoders.lpcnet_codec2"] if lpcnet else [])]
    return Recipe(
        "paper",
        (
            Stage("generation", {"generated.text_to_speech": 0.15}, ends=True),
            Stage("room", {"rooms.room": 0.33}),
            Stage("noise", {"noise.noise": 0.67}),
            Stage(
                "denoiser",
                {
                    "denoisers.deepfilternet3": 1 / 5,
                    "denoisers.nsnet2": 1 / 5,
                    "denoisers.demucs": 1 / 5,
                    "denoisers.spectral_gating": 1 / 5,
                },
            ),
            Stage("vocoder", {name: 0.33 / len(vocoders) for name in vocoders}),
            Stage("codec", {"codecs.opus": 0.5 / 3, "codecs.encodec": 0.5 / 3, "codecs.band_limit": 0.5 / 3}),
        ),
    )


def weights_free(texts: bool = False) -> Recipe:
    """`paper` without the components that need trained weights: their probability goes to 'none' of their stage.

    With `texts`, sentences for it to say, espeak-ng stands for the paper's text-to-speech.
    """
    stages = [
        replace(stage, odds={name: p for name, p in stage.odds.items() if name in WEIGHTS_FREE})
        for stage in paper().stages
    ]
    generation = [Stage("generation", {"generated.espeak": 0.15}, ends=True)] if texts else []
    return replace(paper(), name="weights_free", stages=(*generation, *(stage for stage in stages if stage.odds)))


def as_is() -> Recipe:
    """Recordings as they are, whole files in segments."""
    return Recipe("as_is", whole_files=True)


def voip() -> Recipe:
    """Beyond the paper: what calls do to speech. Rooms and noise as in the paper; the other odds are ours."""
    return Recipe(
        "voip",
        (
            Stage("room", {"rooms.room": 0.33}),
            Stage("noise", {"noise.noise": 0.67}),
            Stage("clipping", {"levels.clipping": 0.2}),
            Stage("level", {"levels.level_changes": 0.3}),
            Stage(
                "transmission",
                {"packets.opus_loss": 0.5, "codecs.g711": 0.1, "codecs.g722": 0.1, "codecs.amr_nb": 0.1},
            ),
        ),
    )


RECIPES = {"paper": paper, "weights_free": weights_free, "voip": voip, "as_is": as_is}
COMPONENTS = tuple(
    dict.fromkeys(
        name
        for recipe in (*(make() for make in RECIPES.values()), paper(lpcnet=True), weights_free(texts=True))
        for name in recipe.components
    )
)
"""All that recipes have."""
RecipeName = Literal["weights_free", "voip", "as_is", "paper"]


def chosen(
    name: RecipeName, without: Collection[str] = (), sources: Mapping[str, str] | None = None, lpcnet: bool = False
) -> Recipe:
    """The recipe as a user asks for it: less the components `without`, with `sources` of assets, not looked at.

    Raises `ValueError` for a name that the recipe has no use for.
    """
    if lpcnet and name != "paper":
        raise ValueError("--lpcnet is an option of recipe paper")
    recipe = paper(lpcnet) if name == "paper" else RECIPES[name]()
    sources = sources or {}
    if name == "weights_free" and "texts" in sources:
        recipe = weights_free(texts=True)
    known = recipe.components
    if unknown := sorted(set(without) - set(known)):
        raise ValueError(f"--without {' '.join(unknown)}: recipe {name} has {', '.join(known) or 'no components'}")
    stages = [replace(stage, odds={c: p for c, p in stage.odds.items() if c not in without}) for stage in recipe.stages]
    wanted = {need.name for component in known for need in degradations.needs(component)}
    wanted |= {"texts"} if name == "weights_free" else set()
    if unknown := sorted(set(sources) - wanted):
        use = ", ".join(sorted(wanted)) or "none"
        raise ValueError(f"--assets {' '.join(unknown)}: recipe {name} has use for {use}")
    given = {name: Asset(source) for name, source in sources.items()}
    return replace(recipe, stages=tuple(stage for stage in stages if stage.odds), assets=given)


def with_assets(recipe: Recipe) -> Recipe:
    """The recipe with all that its components need looked up and hashed.

    Raises `MissingError` telling for each component that lacks something what it is, where to get it and its licence.
    """
    found: dict[str, Asset] = {}
    lacks: dict[str, list[str]] = {}
    for component in recipe.components:
        try:
            degradations.check(component)
        except ImportError as error:
            lacks.setdefault(str(error), []).append(component)
        for need in degradations.needs(component):
            try:
                if need.name not in found:
                    given = recipe.assets.get(need.name)
                    found[need.name] = assets.looked_up(need, given.source if given else None)
            except MissingError as error:
                lacks.setdefault(str(error), []).append(component)
    if lacks:
        lines = "".join(f"\n  {', '.join(components)}: {reason}" for reason, components in lacks.items())
        components = tuple(dict.fromkeys(component for of_reason in lacks.values() for component in of_reason))
        left_out = " ".join(f"--without {name}" for name in components)
        raise MissingError(
            f"recipe {recipe.name!r} has components that lack what they need:{lines}\n"
            f"recipe 'weights_free' works without them; {left_out} leaves out just these",
            components,
        )
    return replace(recipe, assets=found)


def network_passes(recipe: Recipe) -> int:
    """How many times a sample's steps change, at most, from ordinary ones to those of networks."""
    ordinary, network, most = 0, 0, 0
    for stage in recipe.stages:
        kinds = {degradations.network(name) is not None for name in stage.odds}
        after_network = max(network, ordinary + 1) if True in kinds else network
        most = max(most, after_network)
        if not stage.ends:
            ordinary, network = max(ordinary, network) if False in kinds else ordinary, after_network
    return most


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
        return bool(self.steps) and degradations.generates(self.steps[0])

    @property
    def clip_ids(self) -> list[str]:
        own = [] if self.is_generated else [self.clip_id]
        return [*own, *(clip_id for step in self.steps for clip_id in step.clip_ids())]

    def to_json(self) -> str:
        steps = [degradations.to_json(step) for step in self.steps]
        return json.dumps({**asdict(replace(self, steps=())), "steps": steps}, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> "Plan":
        values: dict[str, Any] = json.loads(text)
        steps = tuple(degradations.from_json(step) for step in values.pop("steps"))
        return cls(**values, steps=steps)


class Plans:
    """The plans of a run: `plans[i]` for any i ≥ 0 (below `len` where the recipe covers whole files).

    Clips follow a seeded permutation, a new one each time all were used, so `len(plans)` samples use every clip
    once (or every segment of every clip) and a larger number only adds samples.
    """

    def __init__(self, recipe: Recipe, clips: Clips, seed: int) -> None:
        if recipe.segment_samples <= 0:
            raise ValueError(f"segments of {recipe.segment_s} s are too short; the student's are {SEGMENT_S} s")
        if not len(clips.speech):
            raise ValueError("the manifest has no speech clips; ingest some with --speech DIR")
        self._recipe, self._clips, self._seed = recipe, clips, seed
        scene = self._scene(clips.speech[0], recipe.segment_samples)
        for name in recipe.components:  # what cannot be drawn, for want of texts, is told now
            degradations.component(name)(np.random.default_rng(0), scene)

    def __len__(self) -> int:
        return int(self._ends[-1]) if self._recipe.whole_files else len(self._clips.speech)

    def __getitem__(self, sample_id: int) -> Plan:
        if sample_id < 0 or (self._recipe.whole_files and sample_id >= len(self)):
            raise IndexError(f"sample {sample_id} does not exist; there are {len(self)}")
        if self._recipe.whole_files:
            return self._covered(sample_id)
        return self._drawn(sample_id)

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
        epoch, position = divmod(sample_id, len(self._clips.speech))
        clip = self._clips.speech[int(_permutation(self._seed, epoch, len(self._clips.speech))[position])]
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


def _steps(recipe: Recipe, rng: np.random.Generator, scene: Scene) -> tuple[Step, ...]:
    steps = []
    for stage, u in zip(recipe.stages, rng.random(len(recipe.stages)), strict=True):
        name = _chosen(stage.odds, u)
        if name is not None:
            steps.append(degradations.component(name)(rng, scene))
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
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(0, epoch))).permutation(length)

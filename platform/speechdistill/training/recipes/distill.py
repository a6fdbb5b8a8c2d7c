"""Distil a student from labelled shards and listeners' scores (Distill-MOS, sections III-B and IV-D)."""

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn

from speechdistill.data import scored_clips
from speechdistill.data.label_scale import LabelTransform
from speechdistill.data.scored_clips import Labeled
from speechdistill.engine.held_out import HeldOut
from speechdistill.io import audio, table
from speechdistill.io.errors import AudioError, TableError, UnreadableError, UserError
from speechdistill.models.networks.conv_transformer import (
    SEGMENT_SAMPLES,
    VARIANTS,
    ConvTransformer,
    ConvTransformerConfig,
    to_mos,
)
from speechdistill.models.student import load_student, save_student
from speechdistill.models.windowed import segment_starts
from speechdistill.training import validation
from speechdistill.training.batches import Batches, Mix
from speechdistill.training.lanes import Part
from speechdistill.training.recipe import MSE, Around, Companion, Errors, Term, Validated

_LOG = logging.getLogger(__name__)
_AT_ONCE = 8 * SEGMENT_SAMPLES  # samples, in a validation


@dataclass(frozen=True, kw_only=True)
class Distill:
    """Configuration of a distillation: the student and its training data.

    `labeled` is a `clip.v1` table of scored clips, whose column split selects those for validation. Without it,
    held-out samples of the shards validate. `transform` is a file of schema `label_transform.v1`. `init` is a
    checkpoint folder whose student is trained further. `held_out` lists the samples held out of the shards; by default
    they are determined anew.
    """

    student: ConvTransformerConfig
    mix: Mix
    labeled: str | None = None
    transform: str | None = None
    init: str | None = None
    provenance: Mapping[str, Any] | None = None
    held_out: tuple[HeldOut, ...] | None = None

    def make(self) -> "DistillRecipe":
        """Open the data sources; raises `UserError` for one that cannot be used."""
        return DistillRecipe(self)


def tiny() -> ConvTransformerConfig:
    """The debug twin: a student of 3,000 parameters with every part."""
    return ConvTransformerConfig(max_channels=4, stride_convs=4, dim=8, heads=2, layers=1)


def student(name: str) -> ConvTransformerConfig:
    """The configuration of a variant; raises `UserError` listing the names for an unknown one."""
    known = {**VARIANTS, "tiny": tiny}
    if name not in known:
        raise UserError(f"variant {name!r} is unknown", f"choose from {', '.join(VARIANTS)}")
    return known[name]()


class DistillRecipe:
    """A `TrainingRecipe`: MSE between 1 + 4 * sigmoid(logit) and the target, a MOS."""

    best = MSE

    def __init__(self, config: Distill) -> None:
        self._config = config
        self._student = replace(config.student, segment_samples=config.mix.crop_samples)
        train, self._validation = None, None
        if config.labeled is not None:
            transform = LabelTransform.read(config.transform)
            rows = scored_clips.split(table.read(config.labeled, "clip.v1"))
            train, self._validation = (_scored(part, transform) for part in rows)
        mix = replace(config.mix, hold_out=self._validation is None)
        self.batches = Batches(mix, train if mix.labeled_lanes else None, config.held_out)
        if mix.hold_out and not self.batches.num_held_out:
            raise UserError(
                f"nothing is left to validate on: {self._too_few()}",
                "label clips of more speakers, or give --labeled with clips of split validation",
            )

    def network(self) -> nn.Module:
        if self._config.init:
            network = load_student(self._config.init).network
            network.config = replace(network.config, segment_samples=self._student.segment_samples)
            return network
        torch.manual_seed(self._config.mix.seed)
        return ConvTransformer(self._student)

    def companions(self, network: nn.Module) -> dict[str, Companion]:
        return {}

    def frozen(self) -> nn.Module | None:
        return None

    def errors(self, network: nn.Module, arrays: Mapping[str, Tensor], part: Part, around: Around) -> Errors:
        return {"mse": Term((to_mos(network(arrays["inputs"])) - arrays["targets"]).square())}

    def validate(self, around: Around, rank: int, world: int) -> Validated:
        """Validate; figures are those of `validation.figures`."""
        mine = [(dataset, target, _score(around.network, wave)) for dataset, target, wave in self._clips(rank, world)]
        results = validation.gathered(mine, world)
        if not results:
            raise TableError("No validation clip can be used", "see the warnings above")
        return Validated(validation.figures(results))

    def save(self, around: Around, folder: str, keeps: Mapping[str, float]) -> None:
        assert isinstance(around.network, ConvTransformer)
        save_student(around.network, folder, self._config.provenance or {})

    def _too_few(self) -> str:
        few = [held.about["too_few"] for held in self.batches.held if held.about and "too_few" in held.about]
        return "; ".join(few) or "all scored clips are of split train, or of one speaker"

    def _clips(self, rank: int, world: int) -> Iterator[tuple[str, float, np.ndarray]]:
        """A worker's share of the validation set: dataset, target, wave."""
        if self._validation is None:
            for wave, target in self.batches.held_out(rank, world):
                yield "held out", target, wave
            return
        for clip in list(self._validation.clips())[rank::world]:
            try:
                yield clip.dataset, clip.target, audio.load(clip.uri)
            except UnreadableError:  # perhaps a fault of the storage: the worker is started again
                raise
            except AudioError as error:
                _LOG.warning("%s; validation continues without it", error)


def _scored(rows: pa.Table, transform: LabelTransform) -> Labeled | None:
    return Labeled(rows, transform) if len(rows) else None


def _score(network: nn.Module, wave: np.ndarray) -> float:
    """The mean score of adjacent windows. (Those of the released model overlap, at several times the cost.)"""
    assert isinstance(network, ConvTransformer)
    length = network.config.segment_samples
    starts = segment_starts(len(wave), length, length)
    windows = np.stack([audio.fit(wave[start : start + length], length) for start in starts])
    like = next(network.parameters())
    parts = torch.split(torch.from_numpy(windows).to(like.device, like.dtype), _AT_ONCE // length)
    with torch.inference_mode():
        return 1 + 4 * float(torch.cat([network(part).sigmoid() for part in parts]).mean())

"""Prune a trained teacher's encoder and fine-tune it between the prunings (Distill-MOS, section IV-C)."""

import copy
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from speechdistill.data import scored_clips
from speechdistill.data.label_scale import LabelTransform, Scale
from speechdistill.data.scored_clips import Labeled
from speechdistill.engine.held_out import HeldOut
from speechdistill.io import audio, checkpoint, table
from speechdistill.io.errors import TableError, UserError
from speechdistill.models import architectures
from speechdistill.models.encoder_scorer import Network, TrainedTeacher
from speechdistill.models.networks import slim_encoder
from speechdistill.models.networks.conv_transformer import to_mos
from speechdistill.models.networks.speech_encoder import by_length
from speechdistill.models.options import WHOLE_S
from speechdistill.training import validation
from speechdistill.training.batches import Batches, Mix
from speechdistill.training.lanes import Part
from speechdistill.training.pruning import Pruner, Pruning
from speechdistill.training.recipe import MSE, Around, Companion, Errors, Term, Validated

_AT_ONCE_S = 64 * audio.SEGMENT_S  # of audio, in a validation
_MOST = round(WHOLE_S * audio.SAMPLE_RATE)  # samples of a clip


@dataclass(frozen=True, kw_only=True)
class Pruned:
    """Configuration of a pruning: the teacher and the data of its fine-tuning.

    `teacher` is a checkpoint folder, `encoder` the address of its encoder if that differs from the one in training.
    `labeled` is a `clip.v1` table of scored clips, whose column split selects those for validation. Listeners' scores
    are predicted on the scales of the teacher's listening tests, labels of shards on the universal scale. `held_out`
    lists the samples held out of the shards; by default they are determined anew.
    """

    teacher: str
    encoder: str | None
    mix: Mix
    labeled: str
    pruning: Pruning
    provenance: Mapping[str, Any] | None = None
    held_out: tuple[HeldOut, ...] | None = None

    def make(self) -> "PruningRecipe":
        """Open the data sources; raises `TableError` for clips that cannot be used."""
        return PruningRecipe(self)


class PruningRecipe:
    """A `TrainingRecipe`: MSE between 1 + 4 * sigmoid(logit) and the score, the logit on the scale of its dataset."""

    best = MSE

    def __init__(self, config: Pruned) -> None:
        self._config = config
        rows = scored_clips.split(table.read(config.labeled, "clip.v1"))
        if not len(rows[1]) or (config.mix.labeled_lanes and not len(rows[0])):
            raise TableError(f"{config.labeled}: {len(rows[0])} clips train, {len(rows[1])} validate", "give both")
        self._transform = transform(config.teacher)
        train = Labeled(rows[0], LabelTransform()) if config.mix.labeled_lanes else None
        self._validation = list(Labeled(rows[1], self._transform).clips())
        self.batches = Batches(config.mix, train, config.held_out)
        universal = self._transform.universal
        of = [self._transform.datasets.get(name, universal) for name in self.batches.datasets]
        # The universal scale is last: index -1, the dataset number of teachers' labels.
        self._scales = torch.tensor([(scale.a, scale.b) for scale in (*of, universal)])

    def network(self) -> nn.Module:
        config = self._config
        files = checkpoint.read(config.teacher)
        network = architectures.network(files, config.teacher, config.encoder)
        return network.train().requires_grad_(True)

    def companions(self, network: nn.Module) -> dict[str, Companion]:
        """Make the pruner.

        Raises `UserError` for crops so short that some weights get no gradient, and so are removed first.
        """
        assert isinstance(network, Network)
        least_s = least_crop_s(network.encoder.model.config)
        if self._config.pruning.criterion == "importance" and self._config.mix.crop_s < least_s:
            raise UserError(
                f"crops of {self._config.mix.crop_s:g} s do not reach all weights", f"give --crop-s {least_s:g}"
            )
        return {"pruner": Pruner(network.encoder.model, self._config.pruning)}

    def frozen(self) -> nn.Module | None:
        return None

    def errors(self, network: nn.Module, arrays: Mapping[str, Tensor], part: Part, around: Around) -> Errors:
        assert isinstance(around.network, Network)
        scales = self._scales.to(arrays["targets"])[arrays["datasets"]]
        logits = network(*normalised(arrays["inputs"], around.network.encoder.normalises))
        scores = to_mos(scales[:, 0] * logits + scales[:, 1])
        return {"mse": Term((scores - arrays["targets"]).square())}

    def validate(self, around: Around, rank: int, world: int) -> Validated:
        """Validate on the universal scale, to which scores are mapped.

        Figures are those of `validation.figures` and the remaining share.
        """
        network, pruner = _parts(around)
        mine: list[validation.Result] = []
        clips = self._validation[rank::world]
        for numbers in by_length(
            [min(clip.num_samples, _MOST) for clip in clips], round(_AT_ONCE_S * audio.SAMPLE_RATE)
        ):
            some = [clips[i] for i in numbers]
            with torch.inference_mode():
                waves = network.encoder.prepared(
                    [audio.load_middle(clip.uri, clip.num_samples, _MOST) for clip in some]
                )
                logits = network(waves[0].to(next(network.parameters()).dtype), waves[1]).double()
            universal = self._transform.universal
            scores = to_mos(universal.a * logits + universal.b).tolist()
            mine += [(clip.dataset, clip.target, score) for clip, score in zip(some, scores, strict=True)]
        return Validated({**validation.figures(validation.gathered(mine, world)), "remaining": pruner.remaining})

    def save(self, around: Around, folder: str, keeps: Mapping[str, float]) -> None:
        """Write the pruned teacher, without the heads and neurons that are removed."""
        network, pruner = _parts(around)
        provenance = {
            **(self._config.provenance or {}),
            "pruning": {**asdict(self._config.pruning), "remaining": pruner.remaining},
            "label_transform": self._transform.to_json(),
        }
        if self._config.pruning.criterion == "structured":
            network = copy.deepcopy(network)
            slim_encoder.slim(network.encoder.model, pruner.kept())
        TrainedTeacher.of(network, self._transform.universal).save(network, folder, provenance)


def _parts(around: Around) -> tuple[Network, Pruner]:
    network, pruner = around.network, around.companions["pruner"]
    assert isinstance(network, Network) and isinstance(pruner, Pruner)
    return network, pruner


def transform(teacher: str) -> LabelTransform:
    """The scales of a teacher's listening tests, from its checkpoint; the identity if it has none."""
    found = checkpoint.read(teacher).provenance.get("label_transform")
    if found is None:
        return LabelTransform()
    datasets = {name: Scale(**scale) for name, scale in found["datasets"].items()}
    return LabelTransform(datasets, Scale(**found["universal"]))


def normalised(waves: Tensor, normalises: bool = True) -> tuple[Tensor, Tensor | None]:
    """An encoder's arguments for crops (batch, num_samples): with zero mean and unit variance if it `normalises`.

    Zeros at the end of a crop count as padding, and so does digital silence.
    """
    places = torch.arange(1, waves.shape[1] + 1, device=waves.device)
    lengths = (places * (waves != 0)).amax(dim=1).clamp(min=min(800, waves.shape[1]))  # the rest is padding
    there = places <= lengths[:, None]
    mean = waves.sum(dim=1) / lengths
    centred = (waves - mean[:, None]) * there
    variance = centred.square().sum(dim=1) / lengths
    padded = None if bool((lengths == waves.shape[1]).all()) else lengths
    return centred / (variance + 1e-7).sqrt()[:, None] if normalises else waves, padded


def least_crop_s(encoder: Any) -> float:
    """The shortest crop in s, rounded up to 10 ms, whose frames fill the kernel of the position convolution."""
    samples = encoder.num_conv_pos_embeddings // 2 + 1  # frames
    for kernel, stride in zip(reversed(encoder.conv_kernel), reversed(encoder.conv_stride), strict=True):
        samples = (samples - 1) * stride + kernel
    return float(np.ceil(100 * samples / audio.SAMPLE_RATE) / 100)

"""Train a quality head above a frozen speech encoder on many listening tests (Distill-MOS, section IV-A).

Bias-aware ("BA"): each listening test d has its own scale, a_d * z + b_d of the head's logit z, learned beside the
head. The head predicts on one universal scale, found by grid search.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from speechdistill.data.label_scale import SCHEMA, LabelTransform, Scale
from speechdistill.io import storage, table
from speechdistill.models.encoder_scorer import HEAD, TrainedHead
from speechdistill.models.networks.conv_transformer import QualityHead, to_mos
from speechdistill.training import validation
from speechdistill.training.feature_batches import FeatureBatches
from speechdistill.training.lanes import Part
from speechdistill.training.recipe import MSE, Around, Companion, Errors, Term, Validated

TRANSFORM = "label_transform.v1.json"
"""The file beside a checkpoint that maps scores of its listening tests to the universal scale."""

_AT_ONCE = 32  # clips, in a validation
_GRID = 41


@dataclass(frozen=True, kw_only=True)
class TeacherTraining:
    """Configuration of a head's training: `features` is a folder that `features.compute` filled with `encoder`."""

    features: str
    encoder: str
    encoder_sha256: str
    layer: int
    bias_aware: bool = True
    batch_size: int = 12
    seed: int = 0
    provenance: Mapping[str, Any] | None = None

    def make(self) -> "TeacherRecipe":
        """Open the features; raises `TableError` for features that cannot be used."""
        return TeacherRecipe(self)


class BiasAware(nn.Module):
    """A head and the scales of its listening tests: features (batch, 384, dim) to logits on the scale of each test.

    Scales are exp(log_a) and b. Only AdamW's weight decay, towards 1 and 0, makes them unique: a head of twice the
    logits with half the scales is equivalent.
    """

    def __init__(self, head: QualityHead, num_datasets: int) -> None:
        super().__init__()
        self.head = head
        self.log_a = nn.Parameter(torch.zeros(num_datasets))
        self.b = nn.Parameter(torch.zeros(num_datasets))

    def forward(self, features: Tensor, datasets: Tensor) -> Tensor:
        return self.heard(self.head(features), datasets)

    def heard(self, logits: Tensor, datasets: Tensor) -> Tensor:
        """Map universal logits (batch,) to the scales of these datasets."""
        return self.log_a[datasets].exp() * logits + self.b[datasets]


class Plain(nn.Module):
    """A head alone, with one scale for all listening tests."""

    def __init__(self, head: QualityHead) -> None:
        super().__init__()
        self.head = head

    def forward(self, features: Tensor, datasets: Tensor) -> Tensor:
        logits: Tensor = self.head(features)
        return logits


class TeacherRecipe:
    """A `TrainingRecipe`: MSE between 1 + 4 * sigmoid(logit) and the score as it was given."""

    best = MSE

    def __init__(self, config: TeacherTraining) -> None:
        self._config = config
        self.batches = FeatureBatches(config.features, config.batch_size, config.seed)

    def network(self) -> nn.Module:
        torch.manual_seed(self._config.seed)
        head = QualityHead(self.batches.dim, *HEAD)
        return BiasAware(head, len(self.batches.datasets.names)) if self._config.bias_aware else Plain(head)

    def companions(self, network: nn.Module) -> dict[str, Companion]:
        return {}

    def frozen(self) -> nn.Module | None:
        return None

    def errors(self, network: nn.Module, arrays: Mapping[str, Tensor], part: Part, around: Around) -> Errors:
        scores = to_mos(network(arrays["inputs"], arrays["datasets"]))
        return {"mse": Term((scores - arrays["targets"]).square())}

    def validate(self, around: Around, rank: int, world: int) -> Validated:
        """Validate. `mse` is on the scales of the tests: in the paper the universal scale is found after training, so
        it cannot have chosen the checkpoint. `universal_mse` and `pcc` are on the universal scale.
        """
        results = validation.gathered(self._heads_logits(around.network, rank, world), world)
        datasets, mos, logits = [list(column) for column in zip(*results, strict=True)]
        scales = self._scales(around.network)
        common = universal(np.array(logits), np.array(mos)) if scales else Scale()
        own = [float(scales.get(dataset, common).mos(z)) for dataset, z in zip(datasets, logits, strict=True)]
        figures = validation.figures(list(zip(datasets, mos, own, strict=True)))
        scores = [float(common.mos(z)) for z in logits]
        on_universal = validation.figures(list(zip(datasets, mos, scores, strict=True)))
        correlations = {key: value for key, value in on_universal.items() if key.startswith("pcc")}
        return Validated({**figures, **correlations, "universal_mse": on_universal["mse"]}, vars(common))

    def save(self, around: Around, folder: str, keeps: Mapping[str, float]) -> None:
        config, common = self._config, Scale(**keeps)
        about = TrainedHead(config.encoder, config.encoder_sha256, config.layer, common)
        transform = LabelTransform(self._scales(around.network), common).to_json()
        head: Any = around.network.head
        about.save(head, folder, {**(config.provenance or {}), "label_transform": transform})
        table.check_json(transform, SCHEMA, TRANSFORM)
        storage.publish_json(transform, f"{folder}/{TRANSFORM}")

    def _heads_logits(self, network: nn.Module, rank: int, world: int) -> list[tuple[str, float, float]]:
        """A worker's share of the validation set: dataset, score, logit of the head."""
        like = next(network.parameters())
        results: list[tuple[str, float, float]] = []
        clips = list(self.batches.validation_numbers(rank, world))
        for start in range(0, len(clips), _AT_ONCE):
            some = [self.batches.clip(number) for number in clips[start : start + _AT_ONCE]]
            features = torch.from_numpy(np.stack([clip.features for clip in some])).to(like.device, like.dtype)
            head: Any = network.head
            with torch.inference_mode():
                logits = head(features).double().tolist()
            results += [(clip.dataset, clip.mos, z) for clip, z in zip(some, logits, strict=True)]
        return results

    def _scales(self, network: nn.Module) -> dict[str, Scale]:
        if not isinstance(network, BiasAware):
            return {}
        pairs = zip(network.log_a.exp().tolist(), network.b.tolist(), strict=True)
        return {name: Scale(*pair) for name, pair in zip(self.batches.datasets.names, pairs, strict=True)}


def universal(logits: np.ndarray, mos: np.ndarray) -> Scale:
    """The scale with the least squared error of 1 + 4 * sigmoid(a * z + b) over all clips, by a refined grid search.

    Both arrays are (clips,). a is searched from 1/8 to 8 and b from -4 to 4.
    """
    centre, reach = np.zeros(2), np.array([np.log(8.0), 4.0])  # of log a and b
    for _ in range(4):
        log_a, b = (
            np.linspace(middle - span, middle + span, _GRID) for middle, span in zip(centre, reach, strict=True)
        )
        errors = np.array([[_mse(Scale(np.exp(x), y), logits, mos) for y in b] for x in log_a])
        best = np.unravel_index(errors.argmin(), errors.shape)
        centre, reach = np.array([log_a[best[0]], b[best[1]]]), reach / 8
    return Scale(float(np.exp(centre[0])), float(centre[1]))


def _mse(scale: Scale, logits: np.ndarray, mos: np.ndarray) -> float:
    return float(np.mean((scale.mos(logits) - mos) ** 2))

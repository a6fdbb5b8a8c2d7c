"""The contract of a training recipe, and the settings of a training that every recipe has."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol

from torch import Tensor, nn

from speechdistill.io import fingerprint
from speechdistill.io.errors import UserError
from speechdistill.training.lanes import Batch, Part
from speechdistill.training.schedule import Schedule


@dataclass(frozen=True, kw_only=True)
class Training:
    """How a recipe is trained; the defaults are those of Distill-MOS (section IV-D).

    At each step in `milestones` the network is validated and saved in the folder of that name. `dtype` bfloat16 is
    autocast over float32 parameters, float64 (for tests) applies to everything. Between two validations checkpoints
    are written by time alone.
    """

    steps: int = 250_000
    learning_rate: float = 2e-5
    weight_decay: float = 0.01
    validate_every: int = 5_000
    checkpoint_every_s: float = 300.0
    dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    compile: bool = False
    milestones: tuple[tuple[int, str], ...] = ()
    betas: tuple[float, float] = field(default=(0.9, 0.999), metadata=fingerprint.ADDED)
    schedule: Schedule = field(default=Schedule(), metadata=fingerprint.ADDED)
    clip_norm: float | None = field(default=None, metadata=fingerprint.ADDED)

    def __post_init__(self) -> None:
        if min(self.steps, self.validate_every) < 1 or not self.learning_rate > 0 or self.weight_decay < 0:
            fix = "give steps and a learning rate above 0, and a weight decay of at least 0"
            raise UserError(f"{self} cannot train", fix)

    def identity(self) -> dict[str, Any]:
        """The settings that affect the result."""
        return {**fingerprint.identity(self), "checkpoint_every_s": None, "compile": None}


BEST_VALIDATION = "best_val_"
"""Prefix of the metrics that a finished run has in MLflow: the figures of its best checkpoint."""


class Best(NamedTuple):
    """The validation figure that chooses a run's best checkpoint, and the better direction."""

    figure: str
    direction: Literal["min", "max"]

    def is_better(self, value: float, than: float) -> bool:
        return value < than if self.direction == "min" else value > than

    @property
    def metric(self) -> str:
        """The metric of finished runs that compares them by this figure."""
        return f"{BEST_VALIDATION}{self.figure}"

    @property
    def worst(self) -> float:
        """A value that can never be the best. Not infinite: Ray Train writes that as null, which breaks resuming."""
        return 1e30 if self.direction == "min" else -1e30


MSE = Best("mse", "min")


class Source(Protocol):
    """Batches that are a pure function of their step, such as `batches.Batches`."""

    def stream(self, start: int, stop: int, rank: int, world: int) -> Iterator[Batch]:
        """A worker's share of batches `start` to `stop - 1`."""
        ...


class Companion(Protocol):
    """State that accompanies a network in training, such as a `Pruner`; all calls are made on every worker."""

    def before(self, step: int) -> None:
        """Called before the forward pass of the update that follows `step` others."""
        ...

    def after_backward(self) -> None:
        """Called when gradients are those of the global batch."""
        ...

    def after_update(self, step: int) -> None:
        """Called after the optimiser's step, with the number of updates made."""
        ...

    def state_dict(self) -> Mapping[str, Any]: ...

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> Any: ...


class Around(NamedTuple):
    """A loss's or validation's surroundings: updates made, the network without wrappers, and what accompanies it.

    `frozen` is the recipe's own: in evaluation mode on the device, without gradients, in neither the state nor DDP.
    """

    step: int
    network: nn.Module
    companions: Mapping[str, Companion]
    frozen: nn.Module | None = None


class Term(NamedTuple):
    """A term of the loss: a sum for each sample, and the term's weight. The part's `totals` have its divisor."""

    sums: Tensor
    weight: float = 1.0


Errors = Mapping[str, Term]
"""The terms of the loss of a part, by name."""


class Validated(NamedTuple):
    """Figures over the whole validation set, equal on all workers.

    `keeps` are numbers found in validation that `save` needs; they are part of the training's state.
    """

    figures: Mapping[str, float]
    keeps: Mapping[str, float] = {}  # never changed


class TrainingRecipe(Protocol):
    """A kind of network, trained on a kind of batches, with a loss for each sample."""

    @property
    def batches(self) -> Source: ...

    @property
    def best(self) -> Best: ...

    def network(self) -> nn.Module:
        """Make a new network, the same in every process."""
        ...

    def companions(self, network: nn.Module) -> Mapping[str, Companion]:
        """Make the network's companions, by name."""
        ...

    def frozen(self) -> nn.Module | None:
        """Make the network that the loss uses and does not train, such as a teacher."""
        ...

    def errors(self, network: nn.Module, arrays: Mapping[str, Tensor], part: Part, around: Around) -> Errors:
        """The terms of the loss of a part, whose arrays are on the device.

        All that has a gradient comes from one call of `network`. A parameter that a task does not use, or a layer that
        is dropped, enters as zero times its sum: without a gradient on one worker, workers would diverge silently.
        """
        ...

    def validate(self, around: Around, rank: int, world: int) -> Validated:
        """Validate, each worker on its share of the validation set."""
        ...

    def save(self, around: Around, folder: str, keeps: Mapping[str, float]) -> None:
        """Write the files that a user takes from a checkpoint; `keeps` is empty before the first validation."""
        ...

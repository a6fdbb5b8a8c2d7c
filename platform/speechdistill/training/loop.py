"""The training loop's steps, for one worker of any number: what Ray Train starts, and plain processes may start too.

The global batch is the same whatever the number of workers, and so are loss, gradients and BatchNorm statistics: each
worker's loss is weighted by its share of the batch. (Sums in another order: 1e-12 apart in float64.)
"""

import math
import pickle
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch import distributed as dist

from speechdistill.io.errors import UserError
from speechdistill.training.global_norm import globalise
from speechdistill.training.lanes import Batch
from speechdistill.training.pruning import Pruner

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


@dataclass(frozen=True)
class Training:
    """How a recipe is trained; the defaults are those of Distill-MOS (section IV-D).

    After each of the steps `milestones` it is validated, and what it has become is kept in the folder of that name.

    `dtype` bfloat16 is autocast over float32 parameters, float64 (for tests) is all of it. Time alone decides about a
    checkpoint between two validations.
    """

    steps: int = 250_000
    learning_rate: float = 2e-5
    weight_decay: float = 0.01
    validate_every: int = 5_000
    checkpoint_every_s: float = 300.0
    dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    compile: bool = False
    milestones: tuple[tuple[int, str], ...] = ()

    def __post_init__(self) -> None:
        if min(self.steps, self.validate_every) < 1 or not self.learning_rate > 0 or self.weight_decay < 0:
            fix = "give steps and a learning rate above 0, and a weight decay of at least 0"
            raise UserError(f"{self} cannot train", fix)

    def identity(self) -> dict[str, Any]:
        """What of it decides the result."""
        return {**asdict(self), "checkpoint_every_s": None, "compile": None}


class Source(Protocol):
    """Batches that are a pure function of their step, such as `batches.Batches`."""

    @property
    def batch_size(self) -> int: ...

    def stream(self, start: int, stop: int, rank: int, world: int) -> Iterator[Batch]:
        """A worker's share of batches `start` to `stop - 1`."""
        ...


class Recipe(Protocol):
    """What is trained: a kind of network, on a kind of batches, with a loss for each sample.

    One that prunes has a method `pruner` besides, from a network to its `Pruner`.
    """

    @property
    def batches(self) -> Source: ...

    def network(self) -> nn.Module:
        """A new network, the same in every process."""
        ...

    def losses(self, network: nn.Module, inputs: Tensor, targets: Tensor, datasets: Tensor) -> Tensor:
        """(samples,) from inputs (samples, ...), targets (samples,) and numbers of datasets (samples,)."""
        ...

    def validate(self, network: nn.Module, rank: int, world: int) -> Mapping[str, float]:
        """Figures over the whole validation set, equal on all workers, each of which takes its share; `mse` decides."""
        ...

    def save(self, network: nn.Module, folder: str) -> None:
        """Write what a user takes away from a checkpoint."""
        ...


class Stepped(NamedTuple):
    """A step that was made: its number from 1, the loss over the global batch, and whether worker 0 had `asked`."""

    step: int
    loss: float
    asked: bool


class DamagedStateError(RuntimeError):
    """A checkpoint that no new start could read, either."""


class NotFiniteError(RuntimeError):
    """A loss that is not finite: at which step, from which samples."""


class Loop:
    """A worker's part in the training of a recipe.

    `wrap` makes the network one whose gradients are averaged over the workers (`DistributedDataParallel`).
    """

    def __init__(
        self,
        recipe: Recipe,
        training: Training,
        wrap: Callable[[nn.Module], nn.Module] = lambda network: network,
        device: str = "cpu",
    ) -> None:
        self._recipe, self._training, self._device = recipe, training, torch.device(device)
        self._world = dist.get_world_size() if dist.is_initialized() else 1
        self._rank = dist.get_rank() if dist.is_initialized() else 0
        self._dtype = _DTYPES[training.dtype]
        self._width = torch.float64 if self._dtype is torch.float64 else torch.float32
        self.network = globalise(recipe.network()).to(self._device, self._width)
        self._optimizer = torch.optim.AdamW(
            self.network.parameters(), training.learning_rate, weight_decay=training.weight_decay
        )
        model = wrap(self.network)
        self._model: nn.Module = torch.compile(model) if training.compile else model  # type: ignore[assignment]
        self._pruner: Pruner | None = recipe.pruner(self.network) if hasattr(recipe, "pruner") else None
        self.step, self.best = 0, math.inf

    def run(self, stop: int, asks: Callable[[], bool] = lambda: False) -> Iterator[Stepped]:
        """Train up to step `stop`. What `asks` says on worker 0 is told to all.

        Raises `NotFiniteError` on all workers before the step's update.
        """
        self._model.train()
        for batch in self._recipe.batches.stream(self.step, stop, self._rank, self._world):
            yield self._update(batch, asks)

    def validate(self) -> dict[str, float]:
        """The recipe's figures, and `is_best`, 1 where none before had so small an `mse`.

        Raises `NotFiniteError` on all workers.
        """
        self.network.eval()
        with torch.inference_mode():
            figures = dict(self._recipe.validate(self.network, self._rank, self._world))
        self.network.train()
        if not math.isfinite(figures["mse"]):
            raise NotFiniteError(f"the error on the validation set is not finite after step {self.step}")
        is_best = figures["mse"] < self.best
        self.best = min(self.best, figures["mse"])
        return {**figures, "is_best": float(is_best)}

    def state(self) -> dict[str, Any]:
        """All that a resumed run needs, for `torch.save`; it loads with `weights_only=True`."""
        return {
            "network": self.network.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "rng": torch.get_rng_state(),
            "step": self.step,
            "best": self.best,
            "pruner": self._pruner.state_dict() if self._pruner else None,
        }

    def load(self, state: Mapping[str, Any]) -> None:
        self.network.load_state_dict(state["network"])
        self._optimizer.load_state_dict(state["optimizer"])
        if self._pruner:
            self._pruner.load_state_dict(state["pruner"])
        torch.set_rng_state(state["rng"].cpu())
        self.step, self.best = state["step"], state["best"]

    def _update(self, batch: Batch, asks: Callable[[], bool]) -> Stepped:
        inputs = torch.from_numpy(batch.inputs).to(self._device, self._width)
        targets = torch.from_numpy(batch.targets).to(self._device, self._width)
        datasets = torch.from_numpy(batch.datasets).to(self._device)
        if self._pruner:
            self._pruner.begin(batch.step)
        low = self._dtype is torch.bfloat16
        with torch.autocast(self._device.type, torch.bfloat16, enabled=low):
            losses = self._recipe.losses(self._model, inputs, targets, datasets)
        total = losses.sum() / self._recipe.batches.batch_size
        asked = self._rank == 0 and asks()
        told = torch.stack([total.detach().double(), total.new_tensor(float(asked)).double()])
        if self._world > 1:
            dist.all_reduce(told)
        loss, asked = float(told[0]), bool(told[1])
        if not math.isfinite(loss):
            raise NotFiniteError(self._not_finite(batch, losses))
        self._optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(total * self._world)  # the workers' gradients are averaged
        if self._pruner:
            self._pruner.collect()
        self._optimizer.step()
        if self._pruner:
            self._pruner.hold()
        self.step = batch.step + 1
        return Stepped(self.step, loss, asked)

    def _not_finite(self, batch: Batch, losses: Tensor) -> str:
        bad = np.flatnonzero(~torch.isfinite(losses.detach()).cpu().numpy())
        names: list[list[str]] = [[batch.ids[i] for i in bad]]
        if self._world > 1:
            mine, names = names[0], [[] for _ in range(self._world)]
            dist.all_gather_object(names, mine)
        found = [name for of_worker in names for name in of_worker]
        return f"the loss is not finite at step {batch.step + 1}, from {len(found)} samples: {', '.join(found[:20])}"


def read_state(file: str, out: str) -> dict[str, Any]:
    """What `Loop.state` gave, from a checkpoint of the run in `out`; raises `DamagedStateError` for a file that was cut
    or overwritten.
    """
    try:
        state: dict[str, Any] = torch.load(file, weights_only=True, map_location="cpu")
    except (RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
        reason = " ".join(str(error).split())[:200]
        raise DamagedStateError(f"{file} is damaged ({reason}); delete {out}/ray to train from the start") from error
    return state

"""The training loop of one worker. Ray Train starts it, and so may plain processes.

The global batch, its loss, gradients and BatchNorm statistics do not depend on the number of workers: each sums
of losses are divided by what all workers have together. (Sums in another order differ by 1e-12 in float64.)
"""

import math
import pickle
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

from speechdistill.training.global_norm import globalise
from speechdistill.training.lanes import Batch
from speechdistill.training.recipe import Around, Training, TrainingRecipe

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


class Stepped(NamedTuple):
    """A completed step: its number from 1, the loss over the global batch, and the answer of worker 0's `asks`."""

    step: int
    loss: float
    asked: bool


class DamagedStateError(RuntimeError):
    """A checkpoint that cannot be read, however often the run is started again."""


class NotFiniteError(RuntimeError):
    """A loss that is not finite. The message names the step and the samples."""


class Loop:
    """A worker's part in the training of a recipe.

    `wrap` returns the network with gradients averaged over the workers (`DistributedDataParallel`).
    """

    def __init__(
        self,
        recipe: TrainingRecipe,
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
            self.network.parameters(), training.learning_rate, training.betas, weight_decay=training.weight_decay
        )
        self._wrapped = wrap(self.network)
        self._model: nn.Module = torch.compile(self._wrapped) if training.compile else self._wrapped  # type: ignore[assignment]
        self._companions = recipe.companions(self.network)
        self._frozen = recipe.frozen()
        if self._frozen is not None:
            self._frozen = self._frozen.to(self._device, self._width).eval().requires_grad_(False)
        self.step, self.best = 0, recipe.best.worst
        self.keeps: Mapping[str, float] = {}

    def run(self, stop: int, asks: Callable[[], bool] = lambda: False) -> Iterator[Stepped]:
        """Train up to step `stop`. All workers get the answer of `asks` on worker 0.

        Raises `NotFiniteError` on all workers before the step's update.
        """
        self._model.train()
        for batch in self._recipe.batches.stream(self.step, stop, self._rank, self._world):
            yield self._update(batch, asks)

    @property
    def around(self) -> Around:
        return Around(self.step, self.network, self._companions, self._frozen)

    def validate(self) -> dict[str, float]:
        """Return the recipe's figures, and `is_best`, 1 if the deciding figure is the best so far.

        Raises `NotFiniteError` on all workers.
        """
        self.network.eval()
        with torch.inference_mode():
            validated = self._recipe.validate(self.around, self._rank, self._world)
        self.network.train()
        decides = validated.figures[self._recipe.best.figure]
        if not math.isfinite(decides):
            raise NotFiniteError(f"the error on the validation set is not finite after step {self.step}")
        is_best = self._recipe.best.is_better(decides, self.best)
        self.best, self.keeps = decides if is_best else self.best, dict(validated.keeps)
        return {**validated.figures, "is_best": float(is_best)}

    def save(self, folder: str) -> None:
        """Write the files that a user takes from a checkpoint."""
        self._recipe.save(self.around, folder, self.keeps)

    def state(self) -> dict[str, Any]:
        """The state of a run for `torch.save`. It loads with `weights_only=True`."""
        return {
            "network": self.network.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "step": self.step,
            "best": self.best,
            "keeps": dict(self.keeps),
            "companions": {name: companion.state_dict() for name, companion in self._companions.items()},
        }

    def load(self, state: Mapping[str, Any]) -> None:
        self.network.load_state_dict(state["network"])
        self._optimizer.load_state_dict(state["optimizer"])
        # Checkpoints of earlier versions have a pruner by itself, and an infinity before the first validation.
        earlier = {"pruner": state.get("pruner")}
        for name, companion in self._companions.items():
            companion.load_state_dict(state.get("companions", earlier)[name])
        self.step, self.best = state["step"], state["best"]
        self.keeps = state.get("keeps", {})

    def _update(self, batch: Batch, asks: Callable[[], bool]) -> Stepped:
        for companion in self._companions.values():
            companion.before(batch.step)
        factor = self._training.schedule.factor(batch.step, self._training.steps)
        for group in self._optimizer.param_groups:
            group["lr"] = self._training.learning_rate * factor
        self._optimizer.zero_grad(set_to_none=True)
        passed = [self._pass(batch, index) for index in range(len(batch.parts))]
        total = torch.stack([loss for loss, _ in passed]).sum()
        asked = self._rank == 0 and asks()
        told = torch.stack([total.double(), total.new_tensor(float(asked)).double()])
        if self._world > 1:
            dist.all_reduce(told)
        loss, asked = float(told[0]), bool(told[1])
        if not math.isfinite(loss):
            raise NotFiniteError(self._not_finite(batch, [bad for _, bad in passed]))
        for companion in self._companions.values():
            companion.after_backward()
        if self._training.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(self.network.parameters(), self._training.clip_norm)
        self._optimizer.step()
        self.step = batch.step + 1
        for companion in self._companions.values():
            companion.after_update(self.step)
        return Stepped(self.step, loss, asked)

    def _pass(self, batch: Batch, index: int) -> tuple[Tensor, Tensor]:
        """Forward and backward pass of a part: its share of the loss, and which of its samples are not finite."""
        part = batch.parts[index]
        arrays = {name: self._on_device(array) for name, array in part.arrays.items()}
        torch.manual_seed(_seed(batch.step, part.number))  # of dropout: the same on whichever worker
        is_last = index == len(batch.parts) - 1
        ddp = self._wrapped if isinstance(self._wrapped, DistributedDataParallel) else None
        with ddp.no_sync() if ddp and not is_last else nullcontext():
            with torch.autocast(self._device.type, torch.bfloat16, enabled=self._dtype is torch.bfloat16):
                errors = self._recipe.errors(self._model, arrays, part, self.around)
            sums = {name: term.weight * term.sums for name, term in errors.items()}
            loss = torch.stack([value.sum() / part.totals[name] for name, value in sums.items()]).sum()
            torch.autograd.backward(loss * self._world)  # the workers' gradients are averaged
        is_bad = torch.stack([~torch.isfinite(value.detach()) for value in sums.values()]).any(dim=0)
        return loss.detach(), is_bad

    def _on_device(self, array: np.ndarray) -> Tensor:
        tensor = torch.from_numpy(array).to(self._device)
        return tensor.to(self._width) if tensor.is_floating_point() else tensor

    def _not_finite(self, batch: Batch, bad: list[Tensor]) -> str:
        pairs = zip(batch.parts, bad, strict=True)
        names = [[part.ids[i] for part, is_bad in pairs for i in torch.nonzero(is_bad)[:, 0].tolist()]]
        if self._world > 1:
            mine, names = names[0], [[] for _ in range(self._world)]
            dist.all_gather_object(names, mine)
        ids = [name for of_worker in names for name in of_worker]
        return f"the loss is not finite at step {batch.step + 1}, from {len(ids)} samples: {', '.join(ids[:20])}"


def _seed(step: int, part: int) -> int:
    return int(np.random.SeedSequence([step, part]).generate_state(1, np.uint64)[0] >> np.uint64(1))


def read_state(file: str, out: str) -> dict[str, Any]:
    """Read a stored `Loop.state` of the run in `out`.

    Raises `DamagedStateError` for a file that was cut or overwritten.
    """
    try:
        state: dict[str, Any] = torch.load(file, weights_only=True, map_location="cpu")
    except (RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
        reason = " ".join(str(error).split())[:200]
        raise DamagedStateError(f"{file} is damaged ({reason}); delete {out}/ray to train from the start") from error
    return state

"""Pruning in training: at regular steps the least important weights are set to zero for good.

Distill-MOS, sections IV-C (importance: Molchanov et al. 2019, first-order Taylor) and V-B (magnitude: Gale et al.
2019). The removal of attention heads and feed-forward neurons goes beyond the paper.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from speechdistill.io.errors import UserError
from speechdistill.models.networks.slim_encoder import Kept

_SMOOTHING = 0.9
_CHUNK = 1 << 22  # scores compared at once, which bounds the memory beside them
_LARGEST = 0x7FFF_FFFF


@dataclass(frozen=True, kw_only=True)
class Pruning:
    """The pruning schedule. The defaults are the paper's, which leaves open whether 0.5% is of the original number.

    After each `every` updates, a `share` of the original or of the remaining weights is removed, until at most `until`
    remains. With `importance` all weights of the encoder are ranked together, with `magnitude` and `random` each matrix
    by itself; `structured` ranks attention heads and neurons. `magnitude` removes whole convolution kernels. `seed` is
    for `random`.
    """

    criterion: Literal["importance", "magnitude", "random", "structured"] = "importance"
    share: float = 0.005
    of: Literal["original", "remaining"] = "original"
    every: int = 30
    until: float = 0.29
    seed: int = 0

    def __post_init__(self) -> None:
        if not (0 < self.share < 1 and 0 < self.until < 1 and self.every > 0):
            raise UserError(
                f"Invalid pruning: {self}", "use a share and until between 0 and 1, and every of at least 1"
            )

    def gone(self, times: int) -> float:
        """The share that is removed after `times` prunings."""
        return min(1.0, times * self.share) if self.of == "original" else 1 - (1 - self.share) ** times

    @property
    def times(self) -> int:
        """Number of prunings of a whole run."""
        if self.of == "original":
            return math.ceil((1 - self.until) / self.share - 1e-6)
        return math.ceil(math.log(self.until) / math.log1p(-self.share) - 1e-6)

    @property
    def updates(self) -> int:
        """Updates of a whole run: `every` before each pruning, and after the last."""
        return (self.times + 1) * self.every


class Pruner(nn.Module):
    """Masks of removed weights of an encoder, with their running importance. Nothing in its state dict is trained.

    A `Companion` of the encoder: after the optimiser's step, whose moments move removed weights, they are set to zero
    again. The gradients must be those of the global batch, in equal bits on all workers, as `DistributedDataParallel`
    leaves them: equal weights and gradients make equal scores, so all workers remove the same without communication.

    Matrices and convolutions are pruned. Biases and norms (0.05% of XLS-R) are kept: each shifts a whole channel, and
    the paper's magnitudes are of matrices too. Raises `ValueError` for an encoder that drops blocks or masks features
    in training: weights without gradients would be removed first.
    """

    done: Tensor

    def __init__(self, encoder: nn.Module, config: Pruning) -> None:
        super().__init__()
        for name in ("layerdrop", "mask_time_prob", "mask_feature_prob"):
            if value := getattr(getattr(encoder, "config", None), name, 0):
                raise ValueError(f"the encoder's {name} is {value}: set it to 0 to prune")
        self._config = config
        self._learns = config.criterion in ("importance", "structured")
        self._pools = _blocks(encoder) if config.criterion == "structured" else _weights(encoder, config.criterion)
        self.units = nn.ModuleList(units for pool in self._pools for units in pool)  # for the state dict
        self.register_buffer("done", torch.tensor(0))

    @property
    def remaining(self) -> float:
        """The share that remains."""
        removed = [units.removed for pool in self._pools for units in pool]
        return 1 - sum(int(gone.sum()) for gone in removed) / sum(gone.numel() for gone in removed)

    def before(self, step: int) -> None:
        """Prune if a pruning is due after `step` updates."""
        if step and step % self._config.every == 0 and int(self.done) < self._config.times:
            self.prune()

    @torch.no_grad()
    def after_backward(self) -> None:
        """Update the averages from the gradients; raises `ValueError` if a weight has none."""
        if self._learns:
            for pool in self._pools:
                for units in pool:
                    units.collect()

    def after_update(self, step: int) -> None:
        self.hold()

    @torch.no_grad()
    def hold(self) -> None:
        """Set removed weights to zero again."""
        for pool in self._pools:
            for units in pool:
                units.hold()

    @torch.no_grad()
    def prune(self) -> None:
        """Remove the lowest scores until the removed share is exact. Each block keeps a head and a neuron.

        Raises `ValueError` if no gradients were collected yet.
        """
        if self._learns and not any(bool(units.average.any()) for pool in self._pools for units in pool):
            raise ValueError("no gradients were collected: train some updates before the first pruning")
        done = int(self.done)
        for number, pool in enumerate(self._pools):
            size = sum(units.removed.numel() for units in pool)
            most = size - sum(units.keeps for units in pool)
            before, after = (min(most, round(size * self._config.gone(times))) for times in (done, done + 1))
            rng = np.random.default_rng([self._config.seed, done, number])
            scores = [units.scores(self._config.criterion, rng) for units in pool]
            remove_lowest(scores, [units.removed for units in pool], after - before)
        self.done += 1
        self.hold()

    def kept(self) -> list[Kept]:
        """The heads and neurons that each block keeps, for `slim_encoder.slim`."""
        heads, neurons = ([torch.nonzero(~units.removed)[:, 0] for units in pool] for pool in self._pools)
        return [Kept(*pair) for pair in zip(heads, neurons, strict=True)]

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        """Load the state, and set the weights that it marks as removed to zero."""
        result = super().load_state_dict(state_dict, strict, assign)
        self.hold()
        return result


def remove_lowest(scores: Sequence[Tensor], removed: Sequence[Tensor], count: int) -> None:
    """Mark the `count` lowest scores that remain as `removed`; among equal scores, the first.

    `scores` are float32 of at least 0, `removed` contiguous bool of the same shapes. The result is exact, on the
    tensors' device and without sorting: non-negative floats are ordered like their bits, so a histogram of the upper 16
    bits, then one of the lower 16 bits of the scores at the threshold, find the threshold.
    """
    if count < 1:
        return
    pieces = [
        piece
        for score, gone in zip(scores, removed, strict=True)
        for piece in zip(torch.split(score.reshape(-1), _CHUNK), torch.split(gone.view(-1), _CHUNK), strict=True)
    ]
    high, below = _nth((_keys(*piece) >> 16 for piece in pieces), count)
    lower = (keys[keys >> 16 == high] & 0xFFFF for keys in (_keys(*piece) for piece in pieces))
    low, below_of_equal_high = _nth(lower, count - below)
    threshold, ties = high << 16 | low, count - below - below_of_equal_high
    for score, gone in pieces:
        keys = _keys(score, gone)
        gone |= keys < threshold
        if ties:
            equal = keys == threshold
            equal &= equal.cumsum(0, dtype=torch.int32) <= ties
            gone |= equal
            ties -= int(equal.sum())


def _keys(scores: Tensor, removed: Tensor) -> Tensor:
    """Integers in the order of the scores; removed scores come last."""
    return (scores.view(torch.int32) & _LARGEST).masked_fill_(removed, _LARGEST)


def _nth(digits: Iterator[Tensor], n: int) -> tuple[int, int]:
    """The n-th smallest, from 1, of 16-bit integers, and how many are smaller."""
    counts = sum(torch.bincount(some, minlength=1 << 16) for some in digits)
    assert isinstance(counts, Tensor)
    ends = counts.cumsum(0)
    nth = int(torch.searchsorted(ends, n))
    return nth, int(ends[nth] - counts[nth])


class _Part(NamedTuple):
    """A parameter, and a view of it with the axes of the removable units in front."""

    name: str
    parameter: Tensor
    view: Callable[[Tensor], Tensor] = lambda tensor: tensor


class _Units(nn.Module):
    """Removable units (weights, kernels, heads or neurons), an array of `shape`; `parts` have these axes in front.

    `average` is the running Taylor importance: (g·w)² summed over the weights of a unit. At least `keeps` units remain.
    """

    removed: Tensor
    average: Tensor

    def __init__(self, parts: list[_Part], shape: Sequence[int], learns: bool = True, keeps: int = 0) -> None:
        super().__init__()
        self._parts, self.keeps = parts, keeps
        device = parts[0].parameter.device
        self.register_buffer("removed", torch.zeros(tuple(shape), dtype=torch.bool, device=device))
        if learns:
            self.register_buffer("average", torch.zeros(tuple(shape), device=device))

    def collect(self) -> None:
        self.average.mul_(_SMOOTHING)
        for name, parameter, view in self._parts:
            if parameter.grad is None:
                raise ValueError(f"{name} has no gradient, and so would be the first to be pruned")
            taylor = (view(parameter.grad) * view(parameter)).float().square_()
            self.average.add_(self._summed(taylor), alpha=1 - _SMOOTHING)

    def hold(self) -> None:
        for _, parameter, view in self._parts:
            weights = view(parameter)
            weights.masked_fill_(self.removed.view(*self.removed.shape, *[1] * (weights.ndim - self.removed.ndim)), 0)

    def scores(self, criterion: str, rng: np.random.Generator) -> Tensor:
        """The score of each unit, float32, at least 0."""
        if criterion == "random":
            return torch.from_numpy(rng.random(self.removed.shape, np.float32)).to(self.removed.device)
        if criterion == "magnitude":
            return self._summed(self._parts[0].parameter.float().abs())
        if not self.keeps:
            return self.average
        scores = self.average.clone()
        scores[scores.masked_fill(self.removed, -1).argmax()] = torch.inf  # the best of the remaining units stays
        return scores

    def _summed(self, values: Tensor) -> Tensor:
        inner = tuple(range(self.removed.ndim, values.ndim))
        return values.sum(inner) if inner else values


def _weights(encoder: nn.Module, criterion: str) -> list[list[_Units]]:
    """Pools of weights that are ranked together: all of them, or each matrix by itself."""
    matrices = [_Part(name, parameter) for name, parameter in encoder.named_parameters() if parameter.ndim > 1]
    if criterion == "importance":
        return [[_Units([matrix], matrix.parameter.shape) for matrix in matrices]]
    axes = 2 if criterion == "magnitude" else None  # a kernel for each pair of channels
    return [[_Units([matrix], matrix.parameter.shape[:axes], learns=False)] for matrix in matrices]


def _blocks(encoder: Any) -> list[list[_Units]]:
    """The pools of attention heads and of neurons of a transformers encoder.

    Raises `UserError` for a kind of encoder whose heads share weights."""
    if (kind := encoder.config.model_type) == "wavlm":
        raise UserError(f"heads of a {kind} encoder share a position bias", "prune it by importance or magnitude")
    heads, neurons = [], []
    for number, block in enumerate(encoder.encoder.layers):
        attention, feed = block.attention, block.feed_forward
        count = attention.num_heads
        rows, columns = partial(_rows, count=count), partial(_columns, count=count)
        projections = [(name, getattr(attention, name)) for name in ("q_proj", "k_proj", "v_proj")]
        parts = [_Part(f"block {number}'s {name}", linear.weight, rows) for name, linear in projections]
        parts.append(_Part(f"block {number}'s out_proj", attention.out_proj.weight, columns))
        heads.append(_Units(parts, (count,), keeps=1))
        width = feed.intermediate_dense.out_features
        inner = _Part(f"block {number}'s intermediate_dense", feed.intermediate_dense.weight)
        outer = _Part(f"block {number}'s output_dense", feed.output_dense.weight, torch.t)
        neurons.append(_Units([inner, outer], (width,), keeps=1))
    return [heads, neurons]


def _rows(weight: Tensor, count: int) -> Tensor:
    """View (outputs, inputs) as (count, outputs of each, inputs)."""
    return weight.view(count, -1, weight.shape[1])


def _columns(weight: Tensor, count: int) -> Tensor:
    """View (outputs, inputs) as (count, inputs of each, outputs)."""
    return weight.t().view(count, -1, weight.shape[0])

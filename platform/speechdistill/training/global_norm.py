"""BatchNorm over the global batch, for any number of workers and any split of the batch.

With statistics per worker, the loss would depend on the number of workers. torch's SyncBatchNorm refuses CPU tensors.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist


def globalise(network: nn.Module) -> nn.Module:
    """Make each `BatchNorm1d` of a network global, in place. Keys and values of the state dict do not change."""
    for module in network.modules():
        if type(module) is nn.BatchNorm1d:
            module.__class__ = GlobalBatchNorm1d
    return network


class GlobalBatchNorm1d(nn.BatchNorm1d):
    """`BatchNorm1d` that uses mean and variance over the inputs of all workers in training.

    Every worker must take part in every forward and backward pass, with at least one row. Without a process group and
    in evaluation, the module is a plain `BatchNorm1d`. Under autocast it computes in float32.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Normalise (batch, dim, frames) or (batch, dim). The output has the same shape."""
        if not self.training or not dist.is_initialized() or dist.get_world_size() == 1:
            return super().forward(input)
        others = [axis for axis in range(input.ndim) if axis != 1]
        count = input.new_tensor([input.numel() // input.shape[1]])
        sums = _sum_over_workers(torch.cat([input.sum(others), count]))
        mean = sums[:-1] / sums[-1]
        shape = [1, -1, *[1] * (input.ndim - 2)]
        centred = input - mean.view(shape)
        # Centred squares in a second pass: the difference of two sums of squares loses the digits of a small variance.
        variance = _sum_over_workers(centred.square().sum(others)) / sums[-1]
        self._remember(mean.detach(), variance.detach(), sums[-1].detach())
        scale = self.weight / (variance + self.eps).sqrt()
        out: Tensor = centred * scale.view(shape) + self.bias.view(shape)
        return out

    @torch.no_grad()
    def _remember(self, mean: Tensor, variance: Tensor, count: Tensor) -> None:
        assert self.running_mean is not None and self.running_var is not None and self.momentum is not None
        assert self.num_batches_tracked is not None
        self.num_batches_tracked += 1
        self.running_mean.lerp_(mean, self.momentum)
        self.running_var.lerp_(variance * count / (count - 1), self.momentum)


def _sum_over_workers(tensor: Tensor) -> Tensor:
    total: Tensor = _SumOverWorkers.apply(tensor)  # type: ignore[no-untyped-call]
    return total


class _SumOverWorkers(torch.autograd.Function):
    """The sum of a tensor over all workers. Its gradient is the sum of the workers' gradients."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        total = tensor.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        total = gradients[0].clone()
        dist.all_reduce(total)
        return total

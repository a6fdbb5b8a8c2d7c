"""BatchNorm over all workers: the same numbers as one worker has on the whole batch."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch import distributed as dist

from processes import spawn
from speechdistill.training.global_norm import GlobalBatchNorm1d, globalise

BATCH, FEATURES, FRAMES = 7, 5, 6
SPLITS = [(7,), (1, 6), (2, 2, 3)]


def rows() -> Tensor:
    x = torch.randn(BATCH, FEATURES, FRAMES, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return x * torch.arange(1, FEATURES + 1)[:, None] + 100  # far from 0: where one pass would lose digits


def network() -> nn.Module:
    torch.manual_seed(1)
    layers = nn.Sequential(nn.BatchNorm1d(FEATURES), nn.Conv1d(FEATURES, 3, 2), nn.BatchNorm1d(3), nn.Flatten(1))
    return layers.double()


def outcome(net: nn.Module, x: Tensor, weights: Tensor) -> list[Tensor]:
    """Gradients of a loss that is a sum over rows, and the buffers afterwards."""
    x = x.clone().requires_grad_()
    (net(x).tanh().pow(2).sum(dim=1) * weights).sum().backward()
    return [x.grad, *(p.grad for p in net.parameters()), *net.buffers()]


def worker(rank: int, split: tuple[int, ...], folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=len(split))
    net = globalise(network())
    mine = slice(sum(split[:rank]), sum(split[: rank + 1]))
    grad, *rest = outcome(net, rows()[mine], weights()[mine])
    for gradient in rest[: len(list(net.parameters()))]:
        dist.all_reduce(gradient)
    torch.save([grad, *rest, net.eval()(rows())], f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def weights() -> Tensor:
    return torch.linspace(1, 2, BATCH, dtype=torch.float64)


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.server
def test_any_split_gives_the_gradients_and_statistics_of_the_whole_batch(
    split: tuple[int, ...], tmp_path: Path
) -> None:
    spawn(worker, (split, str(tmp_path)), nprocs=len(split))
    plain = network()
    expected = outcome(plain, rows(), weights())
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in range(len(split))]
    torch.testing.assert_close(torch.cat([own[0] for own in found]), expected[0], rtol=0, atol=1e-10)
    for own in found:
        for mine, theirs in zip(own[1:-1], expected[1:], strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(own[-1], plain.eval()(rows()), rtol=0, atol=1e-10)


def test_the_state_dict_keeps_its_keys_and_values() -> None:
    net = network()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    after = globalise(net).state_dict()
    assert list(after) == list(before) and all(torch.equal(after[key], before[key]) for key in before)
    assert isinstance(net[0], GlobalBatchNorm1d)

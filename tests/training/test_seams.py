"""All seams of the loop at once, in a network of 1,000 parameters: parts, terms, tasks, a frozen network, a companion.

Dropout and layerdrop are on: random numbers belong to the part, not to the worker that computes it.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

from processes import spawn
from speechdistill.io.errors import UserError
from speechdistill.training.lanes import Batch, Part, deal
from speechdistill.training.loop import Loop, NotFiniteError
from speechdistill.training.recipe import Around, Best, Errors, Term, Training, Validated
from speechdistill.training.schedule import Schedule
from speechdistill.training.sources import Cycled, Zipped

STEPS, DIM = 40, 16
TRAINING = Training(
    steps=STEPS,
    learning_rate=0.01,
    dtype="float64",
    schedule=Schedule(shape="tri-stage", warm_up=4, hold=10),
    clip_norm=0.5,
    betas=(0.9, 0.98),
)


@dataclass(frozen=True)
class Numbers:
    """Three parts an update, of two to four samples each."""

    seed: int

    def stream(self, start: int, stop: int, rank: int, world: int) -> Iterator[Batch]:
        for step in range(start, stop):
            yield Batch(step, deal([self._part(step, number) for number in range(3)], rank, world))

    def _part(self, step: int, number: int) -> Part:
        rng = np.random.default_rng([self.seed, step, number])
        inputs = rng.standard_normal((2 + number, DIM))
        arrays = {"inputs": inputs, "targets": inputs[:, ::-1].copy(), "tokens": rng.integers(0, 9, 2 + number)}
        totals = {"copy": 9 * DIM, "teacher": 9.0, "classes": 9.0}
        return Part(number, "", [f"{step}/{number}/{i}" for i in range(2 + number)], arrays, totals)


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(DIM, DIM) for _ in range(3))
        self.dropout, self.classes = nn.Dropout(0.2), nn.Linear(DIM, 9)

    def forward(self, x: Tensor, drops: list[bool]) -> tuple[Tensor, Tensor]:
        for layer, drop in zip(self.layers, drops, strict=True):
            x = x if drop else x + self.dropout(torch.tanh(layer(x)))
        return x, self.classes(x)


class Average:
    """The running mean of the first layer."""

    def __init__(self, network: nn.Module) -> None:
        self._weight = network.get_parameter("layers.0.weight")
        self.mean, self.calls = self._weight.detach().clone(), [0, 0, 0]

    def before(self, step: int) -> None:
        self.calls[0] += 1

    def after_backward(self) -> None:
        self.calls[1] += 1

    def after_update(self, step: int) -> None:
        self.calls[2] += 1
        self.mean.lerp_(self._weight.detach(), 0.1)

    def state_dict(self) -> dict[str, Any]:
        return {"mean": self.mean}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.mean.copy_(state["mean"])


class Recipe:
    batches = Cycled({"copy": Numbers(0), "classify": Zipped((Numbers(1), Numbers(2)))})
    best = Best("accuracy", "max")

    def network(self) -> nn.Module:
        torch.manual_seed(0)
        return Network()

    def frozen(self) -> nn.Module:
        torch.manual_seed(1)
        return nn.Sequential(nn.Linear(DIM, DIM), nn.Dropout(0.9))

    def companions(self, network: nn.Module) -> dict[str, Average]:
        return {"average": Average(network)}

    def errors(self, network: nn.Module, arrays: Mapping[str, Tensor], part: Part, around: Around) -> Errors:
        # Drawn once an update: a layer that one worker drops, all drop.
        drops = (np.random.default_rng(around.step).random(3) < 0.3).tolist()
        out, classes = network(arrays["inputs"], drops)
        average, frozen = around.companions["average"], around.frozen
        assert isinstance(average, Average) and frozen is not None and not frozen.training
        unused = 0 * sum(p.sum() for p in around.network.parameters())  # the task's, and of layers that are dropped
        if part.task == "copy":
            near = frozen(arrays["inputs"]) + arrays["inputs"] @ average.mean
            terms = {"copy": Term((out - arrays["targets"]).square().sum(1))}
            terms["teacher"] = Term((out - near).square().mean(1), 0.5)
        else:
            terms = {"classes": Term(nn.functional.cross_entropy(classes, arrays["tokens"], reduction="none"))}
        first = next(iter(terms))
        return {**terms, first: terms[first]._replace(sums=terms[first].sums + unused)}

    def validate(self, around: Around, rank: int, world: int) -> Validated:
        return Validated({"accuracy": float(around.step)}, {"kept": float(around.step)})

    def save(self, around: Around, folder: str, keeps: Mapping[str, float]) -> None:
        Path(folder, "kept").write_text(str(keeps.get("kept")))


def worker(rank: int, workers: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=workers)
    loop = Loop(Recipe(), TRAINING, DistributedDataParallel)
    if Path(folder, "state.pt").exists():
        loop.load(torch.load(f"{folder}/state.pt", weights_only=True))
    losses = [stepped.loss for stepped in loop.run(STEPS)]
    torch.save((losses, loop.state()), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def alone() -> tuple[list[float], dict[str, Any]]:
    loop = Loop(Recipe(), TRAINING)
    return [stepped.loss for stepped in loop.run(STEPS)], loop.state()


def assert_close(one: Mapping[str, Any], other: Mapping[str, Any], atol: float) -> None:
    for name, value in one["network"].items():
        torch.testing.assert_close(other["network"][name], value, atol=atol, rtol=0)
    torch.testing.assert_close(
        other["companions"]["average"]["mean"], one["companions"]["average"]["mean"], atol=atol, rtol=0
    )


@pytest.mark.server
@pytest.mark.parametrize("workers", [2, 3])
def test_any_number_of_workers_trains_the_same_through_all_seams(workers: int, tmp_path: Path) -> None:
    """One worker, three, and one that becomes two."""
    losses, state = alone()
    assert sum(value.numel() for value in state["network"].values()) == 969
    if workers == 2:
        first = Loop(Recipe(), TRAINING)
        head = [stepped.loss for stepped in first.run(17)]
        torch.save(first.state(), tmp_path / "state.pt")
    spawn(worker, (workers, str(tmp_path)), nprocs=workers)
    results = [torch.load(tmp_path / f"{rank}.pt") for rank in range(workers)]
    for of_worker, other in results[1:]:
        assert of_worker == results[0][0]
        assert_close(results[0][1], other, atol=0)  # to the bit
    np.testing.assert_allclose((head if workers == 2 else []) + results[0][0], losses, atol=1e-8, rtol=0)
    assert_close(state, results[0][1], atol=1e-8)


def test_a_stopped_loop_resumes_as_if_it_had_not_stopped(tmp_path: Path) -> None:
    losses, state = alone()
    first, second = Loop(Recipe(), TRAINING), Loop(Recipe(), TRAINING)
    head = [stepped.loss for stepped in first.run(13)]
    first.validate()
    second.load(first.state())
    assert second.keeps == {"kept": 13.0}
    assert head + [stepped.loss for stepped in second.run(STEPS)] == losses
    assert_close(state, second.state(), atol=0)
    second.save(str(tmp_path))  # by time, before another validation
    assert (tmp_path / "kept").read_text() == "13.0"


def test_the_larger_figure_is_the_best_where_the_recipe_says_so() -> None:
    loop = Loop(Recipe(), TRAINING)
    assert loop.validate()["is_best"] == 1
    list(loop.run(2))
    assert loop.validate()["is_best"] == 1 and loop.best == 2


def test_companions_are_called_around_each_update_and_the_frozen_network_stays() -> None:
    loop = Loop(Recipe(), TRAINING)
    frozen = loop.around.frozen
    assert frozen is not None
    before = [p.clone() for p in frozen.parameters()]
    list(loop.run(5))
    average: Any = loop.around.companions["average"]
    assert average.calls == [5, 5, 5]
    assert all(torch.equal(*pair) for pair in zip(before, frozen.parameters(), strict=True))
    assert not any(p.requires_grad for p in frozen.parameters())
    assert not any(name.startswith("frozen") for name in loop.state())


def test_a_term_that_is_not_finite_names_its_samples_and_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    loop = Loop(Recipe(), TRAINING)
    before = {name: value.clone() for name, value in loop.network.state_dict().items()}
    real = Numbers._part

    def broken(self: Numbers, step: int, number: int) -> Part:
        part = real(self, step, number)
        if number == 2:
            part.arrays["inputs"][1] = np.nan
        return part

    monkeypatch.setattr(Numbers, "_part", broken)
    with pytest.raises(NotFiniteError, match="step 1, from 1 samples: 0/2/1"):
        next(loop.run(1))
    assert all(torch.equal(value, before[name]) for name, value in loop.network.state_dict().items())


def test_more_workers_than_parts_are_refused() -> None:
    with pytest.raises(UserError, match="4 workers cannot share the 3 parts of an update; use at most 3 workers"):
        next(Numbers(0).stream(0, 1, 0, 4))


@pytest.mark.parametrize("start", range(5))
def test_tasks_alternate_from_any_step_and_parts_have_numbers_of_their_own(start: int) -> None:
    steps = list(Recipe.batches.stream(start, 9, 0, 1))
    assert [batch.step for batch in steps] == list(range(start, 9))
    for batch in steps:
        assert {part.task for part in batch.parts} == {("copy", "classify")[batch.step % 2]}
        assert batch.parts[0].ids[0] == f"{batch.step // 2}/0/0"
        numbers = [part.number for part in batch.parts]
        assert len(set(numbers)) == len(numbers) == (3 if batch.step % 2 == 0 else 6)


def test_schedules_are_functions_of_the_step() -> None:
    factors = {
        shape: [Schedule(shape=shape, warm_up=2, hold=3).factor(step, 10) for step in range(10)]  # type: ignore[arg-type]
        for shape in ("constant", "linear", "cosine", "tri-stage")
    }
    assert all(values[:3] == [0.5, 1, 1] for values in factors.values())
    assert factors["constant"][2:] == [1] * 8
    assert factors["linear"][6] == pytest.approx(0.5) == factors["cosine"][6]
    assert factors["tri-stage"][:6] == [0.5, 1, 1, 1, 1, 1] and factors["tri-stage"][9] == pytest.approx(0.05**0.8)
    with pytest.raises(UserError, match="Invalid schedule"):
        Schedule(warm_up=-1)


def test_settings_that_a_run_of_an_earlier_version_has_not_are_no_other_configuration() -> None:
    assert not {"betas", "schedule", "clip_norm"} & set(Training().identity())
    assert TRAINING.identity()["schedule"]["warm_up"] == 4 and TRAINING.identity()["clip_norm"] == 0.5

"""Pruning: what matters least goes, exactly as much as was asked, the same on all workers, and it stays gone."""

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

from processes import spawn
from small_models import xlsr as small_xlsr
from small_models import xlsr_head
from speechdistill.data.label_scale import Scale
from speechdistill.models import architectures
from speechdistill.models.encoder_scorer import EncoderForward, Network, TrainedTeacher
from speechdistill.models.label import Label
from speechdistill.models.networks import slim_encoder
from speechdistill.models.networks.conv_transformer import ConvTransformer
from speechdistill.models.options import TeacherOptions
from speechdistill.models.teachers import xlsr
from speechdistill.training.lanes import Batch, Part, scored
from speechdistill.training.loop import Loop
from speechdistill.training.pruning import Pruner, Pruning, remove_lowest
from speechdistill.training.recipe import MSE, Around, Best, Companion, Errors, Term, Training
from speechdistill.training.recipes.distill import tiny

Files = tuple[str, str]
FAST = Pruning(share=0.05, every=3, until=0.5)
TRAINING = Training(steps=20, learning_rate=1e-3)
BATCH, SAMPLES = 2, 1600


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    folder = tmp_path_factory.mktemp("xlsr")
    # A convolution of positions no wider than the four frames of a batch: all of it is heard.
    return small_xlsr(folder / "encoder", num_conv_pos_embeddings=4), xlsr_head(folder / "head.pt")


def network(files: Files) -> Network:
    return (
        xlsr.load(TeacherOptions(weights=files[0], device="cpu", head=files[1]), layer=3)
        .forward.network.train()
        .requires_grad_(True)
    )


def batch(step: int) -> Batch:
    rng = np.random.default_rng(step)
    waves = rng.standard_normal((BATCH, SAMPLES)).astype(np.float32)
    return Batch(step, (scored(waves, rng.uniform(1, 5, BATCH), np.full(BATCH, -1), [""] * BATCH, BATCH),))


@dataclass
class Recipe:
    """A `TrainingRecipe` of batches of noise."""

    files: Files
    pruning: Pruning
    best: Best = MSE

    @property
    def batches(self) -> SimpleNamespace:
        return SimpleNamespace(stream=self._stream)

    def _stream(self, start: int, stop: int, rank: int, world: int) -> Iterator[Batch]:
        for step in range(start, stop):
            whole = batch(step)
            mine = slice(rank * BATCH // world, (rank + 1) * BATCH // world)
            arrays = {name: array[mine] for name, array in whole.parts[0].arrays.items()}
            yield Batch(step, (whole.parts[0]._replace(arrays=arrays),))

    def network(self) -> Network:
        return network(self.files)

    def companions(self, network: Network) -> dict[str, Companion]:
        return {"pruner": Pruner(network.encoder.model, self.pruning)}

    def frozen(self) -> None:
        return None

    def errors(self, network: nn.Module, arrays: Mapping[str, Tensor], part: Part, around: Around) -> Errors:
        scores = 1 + 4 * torch.sigmoid(network(arrays["inputs"]))
        return {"mse": Term((scores - arrays["targets"]).square())}


def loss(model: nn.Module) -> Tensor:
    first, like = batch(0).parts[0].arrays, next(model.parameters())
    waves, targets = (torch.from_numpy(part).to(like.dtype) for part in (first["inputs"], first["targets"]))
    return (1 + 4 * torch.sigmoid(model(waves)) - targets).square().mean()


def matrices(module: nn.Module) -> list[Tensor]:
    return [weight.detach() for weight in module.parameters() if weight.ndim > 1]


def masks(pruner: Pruner) -> list[Tensor]:
    return [units.removed.clone() for pool in pruner._pools for units in pool]


SCORES: dict[str, Callable[[], Tensor]] = {
    "random": lambda: torch.rand(9_000),
    "of many sizes": lambda: torch.randn(9_000).square() * torch.rand(9_000).pow(30),
    "tied": lambda: torch.randint(0, 5, (9_000,)).float(),
    "half zero": lambda: torch.rand(9_000) * torch.randint(0, 2, (9_000,)),
    "zero": lambda: torch.zeros(9_000),
    "denormal": lambda: torch.randint(0, 99, (9_000,)).float() * 1e-45,
    "infinite": lambda: torch.rand(9_000) / torch.randint(0, 2, (9_000,)),
}


@pytest.mark.parametrize("name", SCORES)
def test_the_lowest_are_those_of_a_stable_sort(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("speechdistill.training.pruning._CHUNK", 1_000)
    torch.manual_seed(0)
    scores, removed = SCORES[name](), torch.rand(9_000) < 0.3
    left = int((~removed).sum())
    order = scores.masked_fill(removed, torch.nan).sort(stable=True).indices  # NaN comes last
    for count in (0, 1, 2_500, left - 1, left):
        expected, found = removed.clone(), removed.clone()
        expected[order[:count]] = True
        parts = [4_100, 0, 900, 4_000]
        remove_lowest(scores.split(parts), found.split(parts), count)
        assert torch.equal(found, expected), count


def test_importance_ranks_weights_as_leaving_each_out_does_on_a_quadratic() -> None:
    torch.manual_seed(0)
    linear = nn.Linear(20, 10, bias=False).double()
    inputs, targets = torch.randn(100, 20).double(), 10 * torch.randn(100, 10).double() + 5
    assert _agreement(linear, linear, lambda: (linear(inputs) - targets).square().mean(), 200) > 0.8


def test_importance_ranks_weights_of_an_encoder_as_leaving_each_out_does(files: Files) -> None:
    model = network(files).double()
    assert _agreement(model, model.encoder, lambda: loss(model), 40) > 0.8


def _agreement(model: nn.Module, encoder: nn.Module, loss: Callable[[], Tensor], count: int) -> float:
    """Spearman's correlation of the importance of `count` weights with the loss's change squared without each."""
    pruner = Pruner(encoder, Pruning())
    before = loss()
    before.backward()
    pruner.after_backward()
    places = [(matrix, place) for matrix, weight in enumerate(matrices(encoder)) for place in range(weight.numel())]
    importance, change = [], []
    for number in np.random.default_rng(0).permutation(len(places))[:count]:
        matrix, place = places[number]
        importance.append(float(pruner._pools[0][matrix].average.flatten()[place]))
        weights = matrices(encoder)[matrix].view(-1)
        value = float(weights[place])
        weights[place] = 0
        with torch.no_grad():
            change.append(float(loss() - before) ** 2)
        weights[place] = value
    ranks = [np.argsort(np.argsort(values)) for values in (importance, change)]
    found = float(np.corrcoef(ranks)[0, 1])
    print(f"rank correlation {found:.3f}")
    return found


def test_importance_is_averaged_recursively() -> None:
    torch.manual_seed(0)
    linear = nn.Linear(5, 3)
    pruner, seen = Pruner(linear, Pruning()), []
    for _ in range(7):
        linear.weight.data = torch.randn(3, 5)
        linear.weight.grad = torch.randn(3, 5)
        pruner.after_backward()
        seen.append((linear.weight.grad * linear.weight.detach()).square())
    closed = sum(0.1 * 0.9 ** (6 - i) * score for i, score in enumerate(seen))
    torch.testing.assert_close(pruner._pools[0][0].average, closed)


def test_heads_and_neurons_have_the_importance_of_their_weights(files: Files) -> None:
    model = network(files)
    whole, single = Pruner(model.encoder.model, Pruning(criterion="structured")), Pruner(model.encoder.model, Pruning())
    loss(model).backward()
    whole.after_backward()
    single.after_backward()
    names = [name for name, weight in model.encoder.model.named_parameters() if weight.ndim > 1]
    of = dict(zip(names, single.units, strict=True))
    block = "encoder.layers.1."
    rows = [of[f"{block}attention.{name}_proj.weight"].average[4:8].sum() for name in "qkv"]
    head = sum(rows) + of[f"{block}attention.out_proj.weight"].average[:, 4:8].sum()
    assert float(whole._pools[0][1].average[1]) == pytest.approx(float(head), rel=1e-5)
    neuron = of[f"{block}feed_forward.intermediate_dense.weight"].average[9].sum()
    neuron += of[f"{block}feed_forward.output_dense.weight"].average[:, 9].sum()
    assert float(whole._pools[1][1].average[9]) == pytest.approx(float(neuron), rel=1e-5)


@pytest.mark.parametrize("of", ["original", "remaining"])
@pytest.mark.parametrize("criterion", ["importance", "magnitude", "random", "structured"])
def test_exactly_the_requested_share_goes_and_nothing_twice(files: Files, criterion: str, of: str) -> None:
    model = network(files)
    pruner = Pruner(model.encoder.model, replace(FAST, criterion=criterion, of=of))
    loss(model).backward()
    pruner.after_backward()
    head = copy.deepcopy(model.head.state_dict())
    seen = [masks(pruner)]
    for times in range(1, 8):
        pruner.prune()
        gone = 0.05 * times if of == "original" else 1 - 0.95**times
        for pool in pruner._pools:  # each matrix, or the encoder
            assert sum(int(u.removed.sum()) for u in pool) == round(gone * sum(u.removed.numel() for u in pool))
        seen.append(masks(pruner))
    for before, after in pairwise(seen):
        assert all(bool((new | ~old).all()) for old, new in zip(before, after, strict=True))
    if criterion in ("importance", "random"):
        assert sum(int((weight == 0).sum()) for weight in matrices(model.encoder)) == sum(
            int(m.sum()) for m in seen[-1]
        )
    assert all(torch.equal(value, head[key]) for key, value in model.head.state_dict().items())


def test_convolutions_whose_memory_is_channels_last_are_pruned_too() -> None:
    student = ConvTransformer(tiny())
    pruner = Pruner(student.cnn, Pruning(share=0.3))
    student(torch.randn(2, 3200)).square().sum().backward()
    pruner.after_backward()
    pruner.prune()
    weights = torch.cat([weight.flatten() for weight in matrices(student.cnn)])
    assert int((weights == 0).sum()) == round(0.3 * len(weights))


def test_magnitude_takes_weights_of_matrices_and_kernels_of_convolutions(files: Files) -> None:
    model = network(files)
    before = copy.deepcopy(model.encoder)
    Pruner(model.encoder.model, Pruning(criterion="magnitude", share=0.3)).prune()
    for old, new in zip(matrices(before), matrices(model.encoder), strict=True):
        norms = old.abs().sum(2) if old.ndim > 2 else old.abs()
        gone = (new == 0).all(2) if new.ndim > 2 else new == 0
        assert norms[gone].max() < norms[~gone].min()
        assert torch.equal(new[~gone], old[~gone])


def test_times_and_updates_are_the_papers() -> None:
    assert (Pruning().times, Pruning(of="remaining").times) == (142, 247)
    assert Pruning().updates == 143 * 30
    assert all(
        Pruning(until=until, of=of).gone(Pruning(until=until, of=of).times) >= 1 - until - 1e-9
        for until in (0.9, 0.5, 0.1)
        for of in ("original", "remaining")
    )


@pytest.mark.parametrize("criterion", ["importance", "structured"])
def test_a_resumed_run_prunes_the_same_bit_for_bit(files: Files, tmp_path: Path, criterion: str) -> None:
    recipe = Recipe(files, replace(FAST, criterion=criterion))
    whole = Loop(recipe, TRAINING)
    losses = [stepped.loss for stepped in whole.run(8)]
    first = Loop(recipe, TRAINING)
    start = [stepped.loss for stepped in first.run(6)]  # the second pruning comes with the next update
    torch.save(first.state(), tmp_path / "state.pt")
    second = Loop(recipe, TRAINING)
    second.load(torch.load(tmp_path / "state.pt", weights_only=True))
    assert start + [stepped.loss for stepped in second.run(8)] == losses
    assert all(map(torch.equal, masks(second.around.companions["pruner"]), masks(whole.around.companions["pruner"])))
    assert int(second.around.companions["pruner"].done) == 2
    ours, theirs = second.network.state_dict(), whole.network.state_dict()
    assert all(torch.equal(value, theirs[key]) for key, value in ours.items())


def test_what_is_gone_stays_zero_under_adamw_and_bfloat16(files: Files) -> None:
    loop = Loop(Recipe(files, FAST), replace(TRAINING, dtype="bfloat16", weight_decay=0.1))
    moved = 0
    for step, _, _ in loop.run(8):
        weights = torch.cat([weight.flatten() for weight in matrices(loop.network.encoder)])
        gone = torch.cat([mask.flatten() for mask in masks(loop.around.companions["pruner"])])
        assert int(gone.sum()) == round(0.05 * ((step - 1) // 3) * len(gone)) and not weights[gone].any()
        state = [loop._optimizer.state[p]["exp_avg"].flatten() for p in loop.network.encoder.parameters() if p.ndim > 1]
        moved += int(torch.cat(state)[gone].count_nonzero())
    assert moved  # the optimiser would have moved them


def test_a_run_ends_at_the_share_that_was_asked(files: Files) -> None:
    pruning = Pruning(criterion="random", share=0.2, every=1, until=0.5)
    loop = Loop(Recipe(files, pruning), TRAINING)
    list(loop.run(pruning.updates + 3))
    assert loop.around.companions["pruner"].remaining == pytest.approx(0.4, abs=0.01)


def pruned(recipe: Recipe) -> list[dict[str, Tensor]]:
    """The state of each criterion's pruner after three prunings, in this worker."""
    states = []
    for criterion in ("importance", "structured"):
        pruning = replace(recipe.pruning, criterion=criterion, every=2)
        loop = Loop(replace(recipe, pruning=pruning), replace(TRAINING, dtype="float64"), DistributedDataParallel)
        list(loop.run(7))
        states.append(loop.around.companions["pruner"].state_dict())
    return states


def worker(rank: int, workers: int, recipe: Recipe, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=workers)
    torch.save(pruned(recipe), f"{folder}/states-{workers}-{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow  # workers of any number are one in test_loop.py
def test_two_workers_prune_what_one_prunes(files: Files, tmp_path: Path) -> None:
    recipe = Recipe(files, FAST)
    spawn(worker, (2, recipe, str(tmp_path)), nprocs=2)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/alone", rank=0, world_size=1)
    try:
        alone = pruned(recipe)
    finally:
        dist.destroy_process_group()
    both = [torch.load(tmp_path / f"states-2-{rank}.pt", weights_only=True) for rank in range(2)]
    for one, first, second in zip(alone, *both, strict=True):
        assert int(one["done"]) == 3
        for key, value in one.items():
            assert torch.equal(first[key], second[key])
            assert torch.equal(first[key], value) or not key.endswith("removed")


@pytest.fixture(scope="module")
def halved(files: Files, tmp_path_factory: pytest.TempPathFactory) -> tuple[Network, Network, str]:
    """A network; the same with half of its heads and neurons masked; the folder of the slim twin of that."""
    model = network(files)
    for weight in matrices(model.encoder.model.encoder.layers):
        weight.mul_(5)  # so that what a block does is heard
    whole = copy.deepcopy(model).eval()
    pruner = Pruner(model.encoder.model, Pruning(criterion="structured", share=0.25))
    loss(model).backward()
    pruner.after_backward()
    pruner.prune()
    pruner.prune()
    twin = copy.deepcopy(model)
    slim_encoder.slim(twin.encoder.model, pruner.kept())
    folder = str(tmp_path_factory.mktemp("slim"))
    TrainedTeacher.of(twin, Scale()).save(twin, folder, {"from": "a test"})
    whole.head.load_state_dict(model.head.state_dict())  # its BatchNorms have seen a batch
    return whole, model.eval(), folder


def test_the_slim_model_is_a_teacher_that_scores_as_the_masked_one(halved: tuple[Network, Network, str]) -> None:
    whole, masked, folder = halved
    teacher = architectures.scorer(folder, TeacherOptions(device="cpu"))
    waves = [batch(1).parts[0].arrays["inputs"].reshape(-1), batch(2).parts[0].arrays["inputs"][0]]
    forward, scores = cast(EncoderForward, teacher.forward), []
    slim = forward.network
    for forward.network in (slim, masked, whole):
        scores.append([label.score for label in teacher.label(waves) if isinstance(label, Label)])
    assert scores[0] == pytest.approx(scores[1], abs=1e-5)
    assert scores[1] != pytest.approx(scores[2], abs=1e-4)
    sizes = [sum(weight.numel() for weight in matrices(n.encoder.model.encoder.layers)) for n in (slim, masked)]
    assert sizes[0] == 0.5 * sizes[1]
    bytes_saved = 4 * (sizes[1] - sizes[0])
    whole_bytes = sum(4 * parameter.numel() for parameter in whole.state_dict().values())
    assert Path(folder, "model.safetensors").stat().st_size < whole_bytes - bytes_saved + 20_000  # names of tensors


def test_the_slim_model_can_be_pruned_further(halved: tuple[Network, Network, str]) -> None:
    folder = halved[2]
    model = architectures.scorer(folder, TeacherOptions(device="cpu")).forward.network.train().requires_grad_(True)
    pruner = Pruner(model.encoder.model, Pruning(criterion="structured", share=0.5))
    loss(model).backward()
    pruner.after_backward()
    pruner.prune()
    before = model.eval()(torch.from_numpy(batch(1).parts[0].arrays["inputs"]))
    slim_encoder.slim(model.encoder.model, pruner.kept())
    torch.testing.assert_close(model(torch.from_numpy(batch(1).parts[0].arrays["inputs"])), before, atol=1e-5, rtol=0)


def test_a_block_keeps_a_head_and_a_neuron(files: Files) -> None:
    model = network(files)
    pruner = Pruner(model.encoder.model, Pruning(criterion="structured", share=0.3, until=0.01))
    loss(model).backward()
    pruner.after_backward()
    pruner._pools[0][0].average.zero_()  # a block that does nothing
    for _ in range(4):
        pruner.prune()
    assert [(len(heads), len(neurons)) for heads, neurons in pruner.kept()] == [(1, 1)] * 3


def test_what_would_prune_wrongly_is_refused(files: Files) -> None:
    model = network(files)
    pruner = Pruner(model.encoder.model, FAST)
    with pytest.raises(ValueError, match="no gradients were collected"):
        pruner.prune()
    loss(model).backward()
    model.encoder.model.encoder.layers[1].attention.k_proj.weight.grad = None
    with pytest.raises(ValueError, match=r"layers\.1\.attention\.k_proj\.weight has no gradient"):
        pruner.after_backward()
    model.encoder.model.config.layerdrop = 0.1
    with pytest.raises(ValueError, match=r"layerdrop is 0\.1: set it to 0"):
        Pruner(model.encoder.model, FAST)
    for wrong in ({"share": 0.0}, {"until": 1.0}, {"every": 0}):
        with pytest.raises(ValueError, match="between 0 and 1"):
            replace(FAST, **wrong)


def test_nothing_is_random_in_the_training_of_an_encoder(files: Files) -> None:
    model = network(files)
    with torch.no_grad():
        assert math.isclose(*(float(loss(model)) for _ in range(2)), rel_tol=0, abs_tol=0)

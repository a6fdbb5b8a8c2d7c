"""Training steps in plain processes: the number of workers changes nothing but who computes."""

import itertools
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from torch import distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from label_runs import label_run
from manifests import row, voice
from processes import spawn
from speechdistill.io import storage, table
from speechdistill.training.batches import Mix
from speechdistill.training.lanes import share
from speechdistill.training.loop import DamagedStateError, Loop, NotFiniteError, read_state
from speechdistill.training.recipe import Training
from speechdistill.training.recipes.distill import Distill, tiny

FLOAT64 = Training(steps=24, dtype="float64", learning_rate=3e-4)
FLOAT32 = Training(steps=24, dtype="float32")


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Distill:
    folder = tmp_path_factory.mktemp("distill")
    rows = []
    for i in range(30):
        soundfile.write(folder / f"{i}.wav", voice(0.5 + i / 30, seed=i), 16000)
        known = {"mos": 1 + i / 10, "dataset": "ab"[i % 2], "split": "train" if i % 5 else "validation"}
        rows.append(row(str(folder / f"{i}.wav"), duration_s=0.5 + i / 30, **known))
    storage.publish(table.parquet_bytes(table.from_rows(rows, "clip.v1")), f"{folder}/labeled.parquet")
    mix = Mix(shards=(label_run(folder / "labels", 24 * 20),), crop_s=0.08)
    return Distill(student=tiny(), mix=mix, labeled=f"{folder}/labeled.parquet")


def train(config: Distill, training: Training, plan: list[tuple[int, int]], folder: Path) -> list[list[object]]:
    """(workers, steps) after each other, each going on from the one before; per step: number, loss, sample ids."""
    done, start = [], 0
    for phase, (workers, steps) in enumerate(plan):
        spawn(worker, (workers, config, training, start + steps, str(folder), phase), nprocs=workers)
        logs = [torch.load(folder / f"log-{phase}-{rank}.pt") for rank in range(workers)]
        for of_step in zip(*logs, strict=True):
            assert len({(number, loss) for number, loss, _ in of_step}) == 1  # all workers saw the same
            done.append([*of_step[0][:2], list(itertools.chain(*(ids for _, _, ids in of_step)))])
        start += steps
    return done


def worker(rank: int, workers: int, config: Distill, training: Training, stop: int, folder: str, phase: int) -> None:
    torch.set_num_threads(1)
    store = f"file://{folder}/rendezvous-{phase}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=workers)
    recipe = config.make()
    loop = Loop(recipe, training, DistributedDataParallel)
    if phase:
        loop.load(torch.load(f"{folder}/state.pt", weights_only=True))
    lanes = share(recipe.batches.batch_size, rank, workers)
    log = []
    for step, loss, _ in loop.run(stop):
        refs = recipe.batches.refs(step - 1)
        log.append((step, loss, recipe.batches.read([refs[lane] for lane in lanes]).ids))
    torch.save(log, f"{folder}/log-{phase}-{rank}.pt")
    figures = loop.validate()
    dist.barrier()
    if rank == 0:
        torch.save({**loop.state(), "figures": figures}, f"{folder}/state.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize(
    ("training", "tolerance"),
    [(FLOAT64, 1e-8), pytest.param(FLOAT32, 1e-4, marks=pytest.mark.slow)],
    ids=["float64", "float32"],
)
@pytest.mark.server
def test_any_number_of_workers_trains_the_same(
    config: Distill, tmp_path: Path, training: Training, tolerance: float
) -> None:
    runs = {}
    for name, plan in {"one": [(1, 24)], "grown": [(1, 8), (2, 8), (3, 8)]}.items():
        folder = tmp_path / name
        folder.mkdir()
        runs[name] = train(config, training, plan, folder), torch.load(folder / "state.pt")
    one, state = runs["one"]
    assert [step for step, _, _ in one] == list(range(1, 25))
    grown, grown_state = runs["grown"]
    assert [ids for _, _, ids in grown] == [ids for _, _, ids in one]
    losses = [[loss for _, loss, _ in run] for run in (grown, one)]
    print(f"largest difference of a loss {np.abs(np.subtract(*losses)).max():.1e}")
    np.testing.assert_allclose(*losses, atol=tolerance, rtol=0)
    if training is FLOAT64:  # in float32 Adam makes whole steps of gradients that are rounding errors
        for key, value in state["network"].items():
            torch.testing.assert_close(grown_state["network"][key], value, atol=100 * tolerance, rtol=0)
    assert grown_state["figures"]["mse"] == pytest.approx(state["figures"]["mse"], abs=10 * tolerance)
    if training is FLOAT64:  # at 2e-5 so few steps are not enough
        assert np.mean([loss for _, loss, _ in one[-5:]]) < np.mean([loss for _, loss, _ in one[:5]])


def test_a_resumed_loop_goes_on_as_if_it_had_not_stopped(config: Distill) -> None:
    whole = [stepped.loss for stepped in Loop(config.make(), FLOAT64).run(12)]
    first = Loop(config.make(), FLOAT64)
    head = [stepped.loss for stepped in first.run(7)]
    second = Loop(config.make(), FLOAT64)
    second.load(first.state())
    assert head + [stepped.loss for stepped in second.run(12)] == whole


@pytest.mark.slow  # the compiler takes a minute
def test_a_compiled_network_trains_the_same(config: Distill) -> None:
    plain, compiled = (
        [stepped.loss for stepped in Loop(config.make(), replace(FLOAT32, compile=on)).run(6)] for on in (False, True)
    )
    assert compiled == pytest.approx(plain, rel=1e-3)


def test_validation_is_the_labeled_set_by_clip_or_else_held_out_labels(config: Distill) -> None:
    recipe = config.make()
    figures = Loop(recipe, FLOAT64).validate()
    assert recipe._validation is not None and not recipe.batches.mix.hold_out
    clips = list(recipe._validation.clips())
    sums = [figures[f"mse/{name}"] * count for name, count in recipe._validation.datasets.counts.items()]
    assert figures["mse"] == pytest.approx(sum(sums) / len(clips))
    without = replace(config, labeled=None, mix=replace(config.mix, labeled_percent=0))
    recipe = without.make()
    assert recipe.batches.mix.hold_out and math.isfinite(Loop(recipe, FLOAT64).validate()["mse"])


def test_a_damaged_clip_is_not_validated_on(config: Distill, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    whole = Loop(config.make(), FLOAT64).validate()
    bad = tmp_path / "bad.wav"
    bad.write_bytes(b"RIFF")
    rows = table.read(str(config.labeled), "clip.v1").to_pylist()
    rows.append(row(str(bad), duration_s=1.0, mos=3.0, dataset="a", split="validation"))
    storage.publish(table.parquet_bytes(table.from_rows(rows, "clip.v1")), f"{tmp_path}/labeled.parquet")
    assert Loop(replace(config, labeled=f"{tmp_path}/labeled.parquet").make(), FLOAT64).validate() == whole
    assert f"{bad}" in caplog.text and "continues without it" in caplog.text


def test_only_a_better_validation_is_the_best(config: Distill) -> None:
    loop = Loop(config.make(), FLOAT64)
    assert loop.validate()["is_best"] == 1
    assert loop.validate()["is_best"] == 0  # equal
    again = Loop(config.make(), FLOAT64)
    again.load(loop.state())
    assert again.best == loop.best


class Broken(nn.Module):
    def forward(self, waves: torch.Tensor) -> torch.Tensor:
        return torch.where(torch.arange(len(waves)) == 6, torch.nan, 0.0).requires_grad_()


def test_a_loss_that_is_not_finite_stops_with_step_and_samples(
    config: Distill, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = config.make()
    loop = Loop(recipe, FLOAT64)
    before = {key: value.clone() for key, value in loop.network.state_dict().items()}
    monkeypatch.setattr(loop, "_model", Broken())
    with pytest.raises(NotFiniteError, match="step 1, from 1 samples: ") as error:
        next(loop.run(5))
    (sixth,) = recipe.batches.read([recipe.batches.refs(0)[6]]).ids
    assert str(error.value).endswith(sixth)
    assert all(torch.equal(value, before[key]) for key, value in loop.network.state_dict().items())


def test_a_student_can_be_trained_further(config: Distill, tmp_path: Path) -> None:
    loop = Loop(config.make(), FLOAT64)
    list(loop.run(3))
    loop.save(str(tmp_path))
    further = Loop(replace(config, init=str(tmp_path)).make(), FLOAT32)
    for key, value in loop.network.state_dict().items():
        torch.testing.assert_close(further.network.state_dict()[key].to(value.dtype), value, atol=1e-6, rtol=1e-6)


def test_low_precision_trains_nearly_the_same(config: Distill) -> None:
    low = [stepped.loss for stepped in Loop(config.make(), replace(FLOAT32, dtype="bfloat16")).run(3)]
    full = [stepped.loss for stepped in Loop(config.make(), FLOAT32).run(3)]
    assert low == pytest.approx(full, rel=0.02) and low != full


@pytest.mark.parametrize("kept", [0, 100, 4_000])
def test_a_checkpoint_that_was_cut_is_no_reason_to_start_again_for_ever(kept: int, tmp_path: Path) -> None:
    file = tmp_path / "state.pt"
    torch.save({"step": 3, "weights": torch.zeros(2_000)}, file)
    assert read_state(str(file), "OUT")["step"] == 3
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(DamagedStateError, match=r"state.pt is damaged .*; delete OUT/ray to train from"):
        read_state(str(file), "OUT")

"""The command that prunes: from a trained teacher to smaller ones, which score and are in the registry."""

import csv
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

import speechdistill
from configs import config_of
from label_runs import label_run
from manifests import voice
from small_models import speech_encoder as small_encoder
from small_training import LocalTrainer, train_here
from speechdistill import cli
from speechdistill.commands import prune
from speechdistill.commands.prune import Prune
from speechdistill.data import scored_clips
from speechdistill.data.label_scale import LabelTransform, Scale
from speechdistill.io import audio, checkpoint, storage, table
from speechdistill.models import architectures, parameters
from speechdistill.models.encoder_scorer import HEAD, TrainedHead
from speechdistill.models.load import load_teacher
from speechdistill.models.networks import speech_encoder
from speechdistill.models.networks.conv_transformer import QualityHead
from speechdistill.models.options import TeacherOptions
from speechdistill.training import ray_train, side_by_side
from speechdistill.training.batches import Mix
from speechdistill.training.pruning import Pruning
from speechdistill.training.recipe import Around
from speechdistill.training.recipes.pruned import Pruned, normalised

ROOT = Path(__file__).parents[2]
RATE = audio.SAMPLE_RATE


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("teacher")
    place = small_encoder(folder / "encoder", "wav2vec2", large=True)
    torch.manual_seed(0)
    about = TrainedHead(place, speech_encoder.load(place, 3).digest, 3, Scale(1.2, 0.1))
    transform = LabelTransform({"a": Scale(0.8, -0.3)}, about.scale).to_json()
    about.save(QualityHead(16, *HEAD), f"{folder}/best", {"label_transform": transform})
    return f"{folder}/best"


@pytest.fixture(scope="module")
def scores(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("scores")
    rows = []
    for i in range(16):
        soundfile.write(folder / f"{i}.wav", voice(0.6 + i / 40, seed=i), RATE)
        rows.append([folder / f"{i}.wav", 1.5 + i / 6, "ab"[i % 2], "validation" if i % 4 > 1 else "train"])
    with (folder / "scores.csv").open("w") as file:
        csv.writer(file).writerows([["path", "mos", "dataset", "split"], *rows])
    return f"{folder}/scores.csv"


@pytest.mark.parametrize("criterion", [pytest.param("importance", marks=pytest.mark.slow), "structured"])
def test_from_a_teacher_to_smaller_ones(
    criterion: str,
    teacher: str,
    scores: str,
    tmp_path: Path,
    local_ray: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    if criterion == "structured":  # without a worker of Ray Train, which takes three times as long
        monkeypatch.setattr(ray_train, "trainer", LocalTrainer)
        monkeypatch.setattr(side_by_side, "train", train_here)
    out = f"{tmp_path}/out"
    command = ["prune", "--model", teacher, "--labeled", scores, "--out", out, "--criterion", criterion]
    command += ["--until", "0.5", "--share", "0.25", "--every", "2", "--keep", "0.75", "--crop-s", "0.5"]
    command += ["--batch-size", "4", "--cpus-per-worker", "0.5", "--register", "pruned"]
    assert cli.main(command) == 0
    printed = capsys.readouterr().out
    names = ["remaining-100", "remaining-75", "remaining-50"]
    assert [line.split()[0] for line in printed.splitlines() if line.startswith("remaining-")] == names
    files = [checkpoint.read(f"{out}/pruned/{name}") for name in names]
    nonzero = [parameters.count(architectures.network(of, "")).nonzero for of in files]
    assert nonzero[0] > nonzero[1] > nonzero[2]
    sizes = [checkpoint.size(f"{out}/pruned/{name}") for name in names]
    assert sizes[0] > sizes[1] > sizes[2] if criterion == "structured" else sizes[0] == sizes[2]
    remaining = [json.loads(Path(f"{out}/pruned/{name}/figures.json").read_text())["remaining"] for name in names]
    assert remaining == pytest.approx([1, 0.75, 0.5], abs=0.01)

    with pytest.raises(ValueError, match="remaining-50 holds its own encoder; elsewhere would not be used"):
        load_teacher(f"{out}/pruned/remaining-50", TeacherOptions(weights="elsewhere", device="cpu"))
    wave = voice(2.0, seed=99)
    before, after = (
        speechdistill.load(place, device="cpu")(wave, RATE) for place in (teacher, f"{out}/pruned/{names[0]}")
    )
    assert before == pytest.approx(after, abs=1e-5)
    address = ["--model", "models:/pruned/3", "--tracking", out]
    soundfile.write(tmp_path / "voice.wav", wave, RATE, subtype="FLOAT")
    assert cli.main(["score", f"{tmp_path}/voice.wav", *address, "--out", f"{tmp_path}/scores.json"]) == 0
    found = json.loads((tmp_path / "scores.json").read_text())[0]["mos"]
    assert found == pytest.approx(speechdistill.load(f"{out}/pruned/{names[2]}", device="cpu")(wave, RATE), abs=1e-5)
    capsys.readouterr()
    assert cli.main([*command, "--share", "0.1"]) == 1
    error = capsys.readouterr().err.rpartition("error: ")[2]
    assert "share: 0.25 -> 0.1" in error and "Traceback" not in error and "ray::" not in error


def test_shares_that_are_reached_at_once_are_one_checkpoint(teacher: str, scores: str, tmp_path: Path) -> None:
    config = config_of(
        Prune, model=teacher, labeled=scores, out=str(tmp_path), share=0.03
    )  # 0.3 and 0.29 remain after 24 times
    recipe, identity = prune._recipe(config)
    milestones = prune._job(config, recipe, identity, (1, 1), 0.0).training.milestones
    assert len({step for step, _ in milestones}) == len(milestones)
    assert [name for _, name in milestones][-2:] == ["remaining-40", "remaining-29"]
    assert milestones[-1][0] == recipe.pruning.updates == 25 * 30


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_bits(teacher: str, scores: str, tmp_path: Path) -> None:
    def command(out: Path) -> list[str]:
        sizes = ["--until", "0.4", "--share", "0.1", "--every", "4", "--keep", "0.7", "--crop-s", "0.5"]
        how = ["--batch-size", "4", "--cpus-per-worker", "0.5", "--checkpoint-every-s", "0.5"]
        places = ["--model", teacher, "--labeled", scores, "--out", str(out)]
        return [sys.executable, str(ROOT / "jobs" / "prune.py"), *places, *sizes, *how]

    whole, killed = tmp_path / "whole", tmp_path / "killed"
    subprocess.run(command(whole), check=True)
    run = subprocess.Popen(command(killed), start_new_session=True)
    reached = killed / "pruned" / "remaining-70" / "figures.json"
    pause = threading.Event()
    while not reached.exists():
        assert run.poll() is None
        pause.wait(0.05)
    os.killpg(run.pid, signal.SIGKILL)
    run.wait()
    assert not (killed / "pruned" / "remaining-40").exists()
    subprocess.run(command(killed), check=True)
    for name in ("remaining-70", "remaining-40"):
        ours, theirs = (checkpoint.read(f"{out}/pruned/{name}").weights for out in (killed, whole))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(value, theirs[key]) for key, value in ours.items()), name


def test_scores_are_heard_on_their_scales_and_labels_on_the_universal_one(
    teacher: str, scores: str, tmp_path: Path
) -> None:
    storage.publish(table.parquet_bytes(scored_clips.manifest(scores)), f"{tmp_path}/clips.parquet")
    mix = Mix(shards=(label_run(tmp_path / "labels", 24 * 20),), labeled_percent=50, batch_size=8, crop_s=0.1)
    recipe = Pruned(
        teacher=teacher, encoder=None, mix=mix, labeled=f"{tmp_path}/clips.parquet", pruning=Pruning()
    ).make()
    part = next(recipe.batches.stream(0, 1, 0, 1)).parts[0]
    of = part.arrays["datasets"]
    assert set(of[:4]) == {0, 1} and set(of[4:]) == {-1}
    network = recipe.network().eval()
    arrays = {name: torch.from_numpy(array) for name, array in part.arrays.items()}
    arrays["targets"] = arrays["targets"].float()
    with torch.no_grad():
        found = recipe.errors(network, arrays, part, Around(0, network, {}))["mse"].sums
        logits = network(*normalised(arrays["inputs"]))
    scales = {0: Scale(0.8, -0.3)}  # "b" is a listening test that the teacher has not heard
    for loss, logit, target, dataset in zip(found, logits, arrays["targets"], of, strict=True):
        scale = scales.get(int(dataset), Scale(1.2, 0.1))
        expected = (1 + 4 * torch.sigmoid(scale.a * logit + scale.b) - target) ** 2
        assert float(loss) == pytest.approx(float(expected), abs=1e-4)


def test_crops_are_prepared_as_the_encoder_wants_them() -> None:
    rng = np.random.default_rng(0)
    waves = [(0.2 + rng.standard_normal(n)).astype(np.float32) for n in (4000, 2500)]
    batch = torch.zeros(2, 4000)
    for row, wave in zip(batch, waves, strict=True):
        row[: len(wave)] = torch.from_numpy(wave)
    found, lengths = normalised(batch)
    assert lengths is not None and lengths.tolist() == [4000, 2500]
    for row, wave in zip(found, waves, strict=True):
        expected = (wave - wave.mean()) / np.sqrt(wave.var() + 1e-7)
        np.testing.assert_allclose(row[: len(wave)].numpy(), expected, atol=1e-5)
        assert not row[len(wave) :].any()
    assert normalised(batch[:1])[1] is None


def test_what_cannot_be_pruned_is_told_before_the_work(
    teacher: str, scores: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from mlflow_runs import student

    place = student(tmp_path / "student")
    for options, message in (
        (["--model", place], "is a student; give a teacher"),
        (["--model", str(tmp_path)], "holds no checkpoint"),
        (["--until", "1.5"], "share and until between 0 and 1"),
        (["--labeled-percent", "0"], "no label shards"),
        (["--crop-s", "0.1"], "crops of 0.1 s do not reach all weights; give --crop-s 0.19"),
        (["--shards", label_run(tmp_path / "labels", 8)], "give --labeled-percent below 100"),
    ):
        command = ["prune", "--model", teacher, "--labeled", scores, "--out", f"{tmp_path}/out", *options]
        assert cli.main(command) == 1
        assert message in capsys.readouterr().err

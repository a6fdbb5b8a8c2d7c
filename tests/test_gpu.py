"""A GPU against a CPU: the same results, and no row lost when its memory is too small.

`SPEECHDISTILL_GPU=cpu` runs the same code where there is no GPU; it then compares the CPU with itself.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch import distributed as dist

from label_runs import label_run
from manifests import voice
from processes import spawn
from small_models import encodec, hifigan, speech_encoder
from speechdistill.data.degradation import Neural
from speechdistill.data.degradations.codecs import EnCodec
from speechdistill.data.degradations.denoisers import Demucs
from speechdistill.data.degradations.vocoders import HifiGan
from speechdistill.io import audio
from speechdistill.labelling.teach import Teach
from speechdistill.models import encoder_scorer
from speechdistill.models.encoder_scorer import HEAD, Network
from speechdistill.models.label import Label
from speechdistill.models.load import load_teacher
from speechdistill.models.networks import speech_encoder as encoders
from speechdistill.models.networks.conv_transformer import SEGMENT_SAMPLES, QualityHead
from speechdistill.models.options import TeacherOptions
from speechdistill.training.batches import Mix
from speechdistill.training.global_norm import globalise
from speechdistill.training.loop import Loop
from speechdistill.training.progress import Progress
from speechdistill.training.ray_train import Job, fit
from speechdistill.training.recipe import Training
from speechdistill.training.recipes.distill import Distill, tiny

DEVICE = os.environ.get("SPEECHDISTILL_GPU", "cuda")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(DEVICE == "cuda" and not torch.cuda.is_available(), reason="no GPU here"),
]


@pytest.fixture(autouse=True)
def whole_float32() -> Iterator[None]:
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


@pytest.fixture
def clips(real_audio: Path) -> list[np.ndarray]:
    """Real speech of several lengths, 4 to 20 s; one window where a CPU is to compute it in bfloat16."""
    files = sorted((real_audio / "speech").glob("*.flac"))[:8]
    if DEVICE == "cpu":
        return [audio.load(str(files[0]))[:SEGMENT_SAMPLES]]
    return [audio.load(str(file)) for file in files]


def scores(labels: Any) -> np.ndarray:
    assert all(isinstance(label, Label) for label in labels), labels
    return np.array([label.score for label in labels])


def test_the_released_model_has_its_known_scores() -> None:
    noise = 0.1 * np.random.RandomState(0).standard_normal(SEGMENT_SAMPLES)
    network: Any = load_teacher("distillmos", TeacherOptions(device=DEVICE))
    found = scores(network.label([noise.astype(np.float32)]))
    assert found == pytest.approx([1.226667], abs=1e-3)


def test_real_clips_score_as_on_the_cpu(clips: list[np.ndarray]) -> None:
    expected = scores(load_teacher("distillmos", TeacherOptions(device="cpu")).label(clips))
    whole, half = (
        load_teacher("distillmos", TeacherOptions(device=DEVICE, dtype=dtype)) for dtype in ("float32", "bfloat16")
    )
    assert np.abs(scores(whole.label(clips)) - expected).max() < 1e-3
    assert np.abs(scores(half.label(clips)) - expected).max() < 0.01


@pytest.mark.parametrize("kind", ["wav2vec2", "hubert", "wavlm"])
@pytest.mark.parametrize("large", [False, True])
def test_encoders_and_a_head_above_them_score_as_on_the_cpu(kind: str, large: bool, tmp_path: Path) -> None:
    place = speech_encoder(tmp_path / "encoder", kind, large)
    torch.manual_seed(0)
    head = QualityHead(16, *HEAD).eval()
    waves = [voice(seconds, seed=i) for i, seconds in enumerate((0.6, 2.0, 7.68, 9.1, 17.0))]
    hidden, found = [], []
    for device in ("cpu", DEVICE):
        encoder = encoders.load(place, 3).encoder.to(device)
        with torch.inference_mode():
            hidden.append(encoder(*encoder.prepared(waves[:3]))[0].cpu())
        options = TeacherOptions(device=device, batch_s=3 * 7.68)
        scorer = encoder_scorer.scorer(Network(encoder, head), "head", "0", options=options)
        found.append(scores(scorer.label(waves)))
    torch.testing.assert_close(hidden[0], hidden[1], rtol=0, atol=1e-4)
    np.testing.assert_allclose(found[0], found[1], rtol=0, atol=1e-4)


def network_step(name: str, folder: Path) -> tuple[Neural, Path]:
    if name == "encodec":
        return EnCodec("", "", 6.0), Path(encodec(folder))
    if name == "hifigan":
        return HifiGan("", ""), hifigan(folder)
    denoiser = pytest.importorskip("denoiser.demucs")
    torch.manual_seed(0)
    torch.save(denoiser.Demucs(hidden=8, sample_rate=audio.SAMPLE_RATE).state_dict(), folder / "demucs.th")
    return Demucs("", ""), folder / "demucs.th"


@pytest.mark.parametrize("name", ["encodec", "hifigan", "demucs"])
def test_a_network_of_a_recipe_makes_the_same_waves(name: str, tmp_path: Path) -> None:
    """Those in ONNX files run where onnxruntime runs them, on a CPU unless `onnxruntime-gpu` is installed."""
    step, weights = network_step(name, tmp_path)
    waves = np.stack([voice(2.0, seed=i) for i in range(3)])
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False), torch.inference_mode():
        alone, together = (step.apply_batch(type(step).load(weights, device), waves) for device in ("cpu", DEVICE))
    np.testing.assert_allclose(alone, together, rtol=0, atol=1e-4)


@pytest.fixture(scope="module")
def labels(tmp_path_factory: pytest.TempPathFactory) -> str:
    return label_run(tmp_path_factory.mktemp("labels"), 24 * 20)


def loop(labels: str, device: str, **training: Any) -> Loop:
    recipe = Distill(student=tiny(), mix=Mix(shards=(labels,), labeled_percent=0, crop_s=0.08)).make()
    return Loop(recipe, Training(steps=40, learning_rate=1e-3, **training), device=device)


def test_a_training_step_has_the_same_loss_and_gradients(labels: str) -> None:
    losses, gradients = [], []
    for device in ("cpu", DEVICE):
        one = loop(labels, device, dtype="float64")
        losses.append(next(iter(one.run(1))).loss)
        gradients.append([parameter.grad.cpu() for parameter in one.network.parameters()])
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)
    for mine, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)


def test_a_checkpoint_goes_to_the_cpu_and_back(labels: str, tmp_path: Path) -> None:
    whole = loop(labels, "cpu", dtype="float64")
    expected = [step.loss for step in whole.run(30)]
    found = []
    for device, stop in ((DEVICE, 10), ("cpu", 20), (DEVICE, 30)):
        one = loop(labels, device, dtype="float64")
        if stop > 10:
            one.load(torch.load(tmp_path / "state.pt", weights_only=True, map_location="cpu"))
        found += [step.loss for step in one.run(stop)]
        torch.save(one.state(), tmp_path / "state.pt")
    assert found == pytest.approx(expected, rel=1e-4)


def norm() -> torch.nn.Module:
    torch.manual_seed(1)
    layers = torch.nn.Sequential(torch.nn.BatchNorm1d(5), torch.nn.Conv1d(5, 3, 2), torch.nn.BatchNorm1d(3))
    return layers.double().to(DEVICE)


def rows() -> Tensor:
    made = torch.randn(7, 5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return (100 + made * torch.arange(1, 6)[:, None]).to(DEVICE)


def normalised_by(rank: int, splits: tuple[int, ...], folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=len(splits))
    mine = slice(sum(splits[:rank]), sum(splits[: rank + 1]))
    torch.save(globalise(norm())(rows()[mine]).detach().cpu(), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_workers_normalise_as_one_does(tmp_path: Path) -> None:
    spawn(normalised_by, ((3, 4), str(tmp_path)), nprocs=2)
    found = torch.cat([torch.load(tmp_path / f"{rank}.pt") for rank in range(2)])
    torch.testing.assert_close(found, norm()(rows()).detach().cpu(), rtol=0, atol=1e-8)


def test_ray_train_starts_with_one_worker(labels: str, tmp_path: Path, local_ray: None) -> None:
    """Its backend is nccl where the worker has a GPU."""
    recipe = Distill(student=tiny(), mix=Mix(shards=(labels,), labeled_percent=0, crop_s=0.08))
    job = Job(
        make=recipe.make,
        training=Training(steps=4, learning_rate=1e-3),
        out=f"{tmp_path}/run",
        identity={"seed": 0},
        gpus=float(DEVICE == "cuda"),
    )
    assert fit(job, Progress(job.starts))["steps"] == 4


@pytest.mark.skipif(DEVICE != "cuda", reason="a CPU's memory has no such limit")
def test_a_batch_that_does_not_fit_the_memory_loses_no_row() -> None:
    work = Teach("distillmos", None, None, "float32", 256 * 7.68, load_teacher("distillmos").weights_hash)
    waves = [voice(7.68, seed=i % 5) for i in range(256)]
    encoded = [audio.encode(audio.quantise(wave), "pcm16") for wave in waves]
    rows = [{"audio": data, "audio_format": "pcm16"} for data in encoded]
    torch.cuda.empty_cache()
    _, whole = torch.cuda.mem_get_info()
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 3 * 2**30) / whole)
    try:
        results = work(rows)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert len(results) == 256 and all(isinstance(result, dict) and result["score"] for result in results)
    assert work._teacher.batch < 256

"""Any student scores as its network does, windows averaged; the released one is just one of them."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from manifests import voice
from speechdistill.io import audio
from speechdistill.models.label import Label
from speechdistill.models.load import load_teacher, teacher_names
from speechdistill.models.model import Model
from speechdistill.models.networks.conv_transformer import ConvTransformer, ConvTransformerConfig
from speechdistill.models.options import TeacherOptions
from speechdistill.models.student import save_student
from speechdistill.models.student_scorer import scorer
from speechdistill.models.teachers import distillmos
from speechdistill.models.windowed import segment_starts

RATE = audio.SAMPLE_RATE


def made(config: ConvTransformerConfig) -> ConvTransformer:
    torch.manual_seed(0)
    network = ConvTransformer(config).eval()
    with torch.no_grad():
        network.transformer_pool_attn.pool.linear3.weight.mul_(30)
    return network


@pytest.mark.parametrize("stride_convs", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("duration_s", [0.3, 5.0, 10.0])
def test_every_depth_scores_as_its_plain_network(stride_convs: int, duration_s: float) -> None:
    assert_scores_as_plain(
        ConvTransformerConfig(max_channels=6, stride_convs=stride_convs, dim=8, heads=2, layers=1), voice(duration_s)
    )


@pytest.mark.parametrize("segment_samples", [320, 1_280, 30_720])
@pytest.mark.parametrize("duration_s", [0.3, 1.92, 5.0])
def test_a_student_of_short_crops_is_given_windows_of_that_length(segment_samples: int, duration_s: float) -> None:
    config = ConvTransformerConfig(max_channels=6, dim=8, heads=2, layers=1, segment_samples=segment_samples)
    assert_scores_as_plain(config, voice(duration_s))


def assert_scores_as_plain(config: ConvTransformerConfig, wave: np.ndarray) -> None:
    (label,) = scorer(made(config), "student", "hash").label([wave])
    length = config.segment_samples
    windows = [audio.fit(wave[at:], length) for at in segment_starts(len(wave), min(RATE, length), length)]
    with torch.inference_mode():
        logits = made(config)(torch.from_numpy(np.stack(windows)))
    assert isinstance(label, Label)
    assert label.score == pytest.approx(Label.from_logits(logits.numpy()).score, abs=1e-5)


def test_the_released_model_scores_the_same_as_a_student(tmp_path: Path) -> None:
    path = distillmos._released_weights()
    save_student(distillmos._network(Path(path).read_bytes(), path), str(tmp_path / "v7"), {})
    one, several = voice(3.0), voice(8.5)
    for options, wave in (({}, one), ({"dtype": "bfloat16"}, one), ({"hop_s": 7.68}, several)):
        released, ours = (
            Model(load_teacher(name, TeacherOptions(**options))) for name in ("distillmos", str(tmp_path / "v7"))
        )
        assert ours(wave, RATE) == released(wave, RATE)
    assert ours.teacher.name == "student" and released.teacher.name == "distillmos"


def test_the_teacher_student_wants_to_know_which(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no released weights; give a checkpoint's folder"):
        load_teacher("student")
    assert "student" not in teacher_names()


def test_a_batch_that_does_not_fit_a_gpus_memory_becomes_smaller_for_good() -> None:
    small = ConvTransformerConfig(max_channels=4, stride_convs=4, dim=8, heads=2, layers=1)
    teacher = scorer(ConvTransformer(small), "small", "0", TeacherOptions(device="cpu", batch_s=8 * 7.68))
    waves = [voice(1.0, seed=i) for i in range(7)]
    alone = [label for wave in waves for label in teacher.label([wave])]
    forward, sizes = teacher.forward, []

    class Limited:
        network = None

        def __call__(self, windows: Sequence[np.ndarray]) -> torch.Tensor:
            sizes.append(len(windows))
            if len(windows) > 2:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return forward(windows)

    teacher.forward = Limited()
    for found, expected in zip(teacher.label(waves), alone, strict=True):
        assert isinstance(found, Label) and isinstance(expected, Label)
        assert found.score == pytest.approx(expected.score, abs=1e-5)
    assert sizes == [7, 4, 2, 2, 2, 1]
    sizes.clear()
    teacher.label(waves[:3])
    assert sizes == [2, 1]

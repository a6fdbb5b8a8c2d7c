"""DNSMOS P.808 and P.835 as teachers: the scores of the wheel, whatever the length and batch."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from speechdistill.io import audio, weights_file
from speechdistill.models.label import Label, Teacher
from speechdistill.models.load import load_teacher
from speechdistill.models.options import TeacherOptions
from speechdistill.models.teachers import dnsmos_p808, dnsmos_p835
from speechdistill.models.windowed import WindowScorer

RATE = audio.SAMPLE_RATE
HAS_WHEEL = Path(weights_file.of_package("speechmos", dnsmos_p808.FILE)).is_file()
needs_wheel = pytest.mark.skipif(not HAS_WHEEL, reason="needs the wheel speechmos")

# Scores of the wheel's own code (speechmos 0.0.1.1 with librosa 0.11, onnxruntime on a CPU) of `speech` of so many
# seconds: P.808, then P.835's OVRL.
RELEASED = {
    0.5: (2.204323, 1.865917),
    3.0: (2.265107, 1.887669),
    8.0: (2.321959, 1.854686),
    9.01: (2.262278, 1.960958),
    12.3: (2.289059, 1.911425),
    35.0: (2.314219, 1.957996),
}


def speech(duration_s: float) -> np.ndarray:
    """Harmonics of a gliding voice in syllables, over noise: the same on every machine."""
    t = np.arange(round(duration_s * RATE)) / RATE
    phase = 2 * np.pi * (120 * t + 4 * np.sin(2 * np.pi * 0.7 * t))
    voice = sum(np.sin(k * phase) / k for k in range(1, 30)) * np.maximum(0, np.sin(2 * np.pi * 2 * t)) ** 2
    noise = np.random.RandomState(0).standard_normal(len(t))
    return (0.1 * voice + 0.002 * noise).astype(np.float32)


def scores(teacher: Teacher, waves: list[np.ndarray]) -> list[float]:
    return [label.score for label in teacher.label(waves) if isinstance(label, Label)]


@needs_wheel
@pytest.mark.parametrize(
    ("duration_s", "p808", "p835"),
    [pytest.param(s, *mos, marks=[pytest.mark.slow] if s in (3.0, 8.0, 35.0) else []) for s, mos in RELEASED.items()],
)
def test_scores_are_those_of_the_wheel(duration_s: float, p808: float, p835: float) -> None:
    wave = speech(duration_s)
    assert scores(dnsmos_p808.load(TeacherOptions(device="cpu")), [wave]) == pytest.approx([p808], abs=1e-3)
    assert scores(dnsmos_p835.load(TeacherOptions(device="cpu")), [wave]) == pytest.approx([p835], abs=1e-3)


@needs_wheel
@pytest.mark.parametrize("name", ["dnsmos_p808", "dnsmos_p835"])
def test_a_mixed_batch_scores_each_wave_as_if_alone(name: str) -> None:
    waves = [speech(s) * np.float32(g) for s, g in ((11, 1), (1, 0.3), (9.01, 0.1))]
    silent = np.zeros(RATE, np.float32)
    teacher = load_teacher(name, TeacherOptions(device="cpu", batch_s=30))
    single = load_teacher(name, TeacherOptions(device="cpu", batch_s=1))
    alone = [score for wave in waves for score in scores(single, [wave])]
    results = teacher.label([waves[0], silent, *waves[1:]])
    assert [isinstance(result, Label) for result in results] == [True, False, True, True]
    assert [label.score for label in results if isinstance(label, Label)] == pytest.approx(alone, abs=1e-4)
    assert np.ptp(alone) > 0.01
    assert teacher.name == name and len(teacher.weights_hash) == 64
    timeline = teacher.timeline(waves[0])
    assert len(timeline) == 11
    assert timeline[0][1] != timeline[-1][1]


@needs_wheel
def test_windows_lie_as_in_the_wheel() -> None:
    teacher = dnsmos_p835.load(TeacherOptions(device="cpu"))
    fast = dnsmos_p835.load(TeacherOptions(device="cpu", hop_s=9))

    def starts(duration_s: float, of: WindowScorer = teacher) -> list[int]:
        return [start // RATE for start in of.windows.starts(np.zeros(round(duration_s * RATE), np.float32))]

    assert starts(9.01) == starts(10.9) == [0]
    assert starts(11) == [0, 1]
    assert starts(8) == [*range(7)]  # of 16 s
    assert starts(35) == [*range(7), 24, 25]
    assert starts(35, fast) == [0, 9, 18]


def test_what_is_missing_or_wrong_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "torn.onnx").write_bytes(b"no network")
    with pytest.raises(ValueError, match=r"torn\.onnx: not an ONNX network"):
        dnsmos_p808.load(TeacherOptions(weights=str(tmp_path / "torn.onnx"), device="cpu"))
    with pytest.raises(ValueError, match="'dnsmos_p835' is float32"):
        dnsmos_p835.load(TeacherOptions(dtype="bfloat16"))
    with pytest.raises(ValueError, match=r"up to 9\.01"):
        dnsmos_p835.load(TeacherOptions(hop_s=10))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match=r"model_v8\.onnx.*pip install --no-deps speechmos==0\.0\.1\.1"):
        dnsmos_p808.load(TeacherOptions(device="cpu"))

"""Distill-MOS as a teacher and as a function: the released scores, whatever the length, batch and input."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

import speechdistill
from speechdistill.io import audio
from speechdistill.models import student_scorer
from speechdistill.models.label import Label, Unscorable
from speechdistill.models.load import load_teacher
from speechdistill.models.model import Model
from speechdistill.models.networks.conv_transformer import SEGMENT_SAMPLES, features
from speechdistill.models.options import TeacherOptions
from speechdistill.models.teachers import distillmos
from speechdistill.models.windowed import WindowScorer, segment_starts

RATE = audio.SAMPLE_RATE

# Known answers of LibriSpeech files: scores of the released `distillmos` 0.9.1 code itself (with the `xls-r-sqa`
# 0.1.0 wheel that it needs and an empty module in place of torchaudio), float32, torch 2.13 on a CPU, whole
# files as float32 at 16 kHz. Lengths: 1.65, 3.41, 11.28 and 11.30 s.
RELEASED = {
    "1447-130550-0000": 3.310126,
    "2764-36616-0000": 4.020490,
    "6209-34599-0000": 3.930674,
    "7635-105409-0000": 4.542277,
}


@pytest.fixture(scope="module")
def teacher() -> WindowScorer:
    return distillmos.load(TeacherOptions(device="cpu"))


def noise(duration_s: float, seed: int = 0) -> np.ndarray:
    return (0.1 * np.random.default_rng(seed).standard_normal(round(duration_s * RATE))).astype(np.float32)


def scored(result: Label | Unscorable) -> Label:
    assert isinstance(result, Label), result
    return result


def test_real_speech_scores_as_the_released_package_does(teacher: WindowScorer, real_audio: Path) -> None:
    waves = [audio.load(str(real_audio / "speech" / f"{name}.flac")) for name in RELEASED]
    scores = [scored(label).score for label in teacher.label(waves)]
    assert scores == pytest.approx(list(RELEASED.values()), abs=1e-4)


def test_a_mixed_batch_scores_each_wave_as_if_alone(teacher: WindowScorer) -> None:
    waves = [noise(s, seed) for seed, s in enumerate((1.0, 8.7, 7.68, 0.1))]
    batched = distillmos.load(TeacherOptions(device="cpu", batch_s=4 * 7.68)).label(waves)
    for wave, label in zip(waves, batched, strict=True):
        (alone,) = teacher.label([wave])
        assert scored(label).score == pytest.approx(scored(alone).score, abs=1e-5)


def test_bad_waves_are_reported_in_place_and_their_neighbours_scored(teacher: WindowScorer) -> None:
    with_nan, with_inf, late_nan = noise(1), noise(1), np.tile(noise(1), 80)
    with_nan[7], with_inf[-1], late_nan[-1] = np.nan, -np.inf, np.nan
    waves = {
        "": noise(1),
        "no samples": np.zeros(0, np.float32),
        "0.099 s is shorter than 0.1 s": noise(0.099),
        "NaN or infinite": with_nan,
        "NaN or infinite s": with_inf,
        "NaN or infinite sa": late_nan,
        "silent": np.zeros(RATE, np.float32),
        "silent (peak": np.full(RATE, 0.99e-4, np.float32),
    }
    results = teacher.label([*waves.values(), noise(2)])
    assert [isinstance(r, Unscorable) for r in results] == [False, *[True] * 7, False]
    for reason, result in list(zip(waves, results, strict=False))[1:]:
        assert str(result).startswith(reason)
    assert scored(results[0]).score == scored(teacher.label([noise(1)])[0]).score
    assert teacher.label([]) == []
    assert all(isinstance(r, Unscorable) for r in teacher.label([with_nan]))


def test_quiet_speech_above_the_limit_is_scored(teacher: WindowScorer) -> None:
    wave = noise(1)
    quiet = wave * np.float32(1.1e-4 / np.abs(wave).max())
    loud_score, quiet_score = (scored(label).score for label in teacher.label([wave, quiet]))
    assert quiet_score == pytest.approx(loud_score, abs=2e-3)


def test_label_averages_scores_and_not_logits() -> None:
    label = Label.from_logits(np.array([-2.0, 3.0]))
    scores = [1 + 4 / (1 + np.exp(2.0)), 1 + 4 / (1 + np.exp(-3.0))]
    assert label.score == pytest.approx(np.mean(scores), abs=1e-12)
    assert label.disagreement == pytest.approx(np.std(scores), abs=1e-12)
    assert label.logit == pytest.approx(np.log((label.score - 1) / (5 - label.score)), abs=1e-12)
    assert Label.from_logits(np.array([1.25])) == (
        pytest.approx(1 + 4 / (1 + np.exp(-1.25))),
        pytest.approx(1.25),
        None,
    )
    assert np.isfinite(Label.from_logits(np.array([1e4])).logit)
    assert np.isfinite(Label.from_logits(np.array([-1e4])).logit)


@pytest.mark.parametrize(
    ("num_samples", "starts"),
    [
        (1600, [0]),
        (SEGMENT_SAMPLES, [0]),
        (SEGMENT_SAMPLES + 1, [0, 1]),
        (SEGMENT_SAMPLES + 16_000, [0, 16_000]),
        (10 * RATE, [0, 12_373, 24_746, 37_120]),  # 10 s cost four windows
    ],
)
def test_windows_lie_as_in_the_released_model(num_samples: int, starts: list[int]) -> None:
    assert segment_starts(num_samples) == starts


@pytest.mark.parametrize(("duration_s", "exact", "fast"), [(7.68, 1, 1), (8.68, 2, 2), (10, 4, 2), (60, 54, 8)])
def test_a_longer_hop_takes_fewer_windows(duration_s: float, exact: int, fast: int) -> None:
    samples = round(duration_s * RATE)
    starts = segment_starts(samples, SEGMENT_SAMPLES)
    assert (len(segment_starts(samples)), len(starts)) == (exact, fast)
    assert starts[0] == 0
    assert starts[-1] == samples - SEGMENT_SAMPLES
    assert max(np.diff(starts), default=0) <= SEGMENT_SAMPLES  # every sample is heard


def test_the_fast_mode_averages_its_own_windows(teacher: WindowScorer) -> None:
    wave = np.concatenate([noise(8), 0.3 * np.sin(np.arange(4 * RATE) / 5).astype(np.float32)])
    fast = Model(load_teacher("distillmos", TeacherOptions(device="cpu", hop_s=7.68)))
    windows = [wave[start : start + SEGMENT_SAMPLES] for start in (0, 69_120)]  # centres 3.84 and 8.16 s
    scores = [scored(label).score for label in teacher.label(windows)]
    assert fast(wave, RATE) == pytest.approx(np.mean(scores), abs=1e-5)
    assert fast(wave, RATE) != pytest.approx(Model(teacher)(wave, RATE), abs=1e-3)
    timeline = [score for _, score in fast.teacher.timeline(wave)]
    assert timeline == pytest.approx([scores[i] for i in 6 * [0] + 6 * [1]], abs=1e-5)


@pytest.mark.parametrize("hop_s", [0, -1, 7.69, float("inf"), float("nan")])
def test_a_hop_that_skips_audio_is_refused(hop_s: float) -> None:
    with pytest.raises(ValueError, match=rf"hop_s {hop_s}; choose seconds above 0 and up to 7\.68"):
        load_teacher("distillmos", TeacherOptions(device="cpu", hop_s=hop_s))


def test_timeline_gives_each_second_the_nearest_window(teacher: WindowScorer) -> None:
    wave = np.concatenate([noise(8), 0.3 * np.sin(np.arange(round(2.5 * RATE)) / 5).astype(np.float32)])
    timeline = teacher.timeline(wave)
    assert [start for start, _ in timeline] == [float(s) for s in range(11)]
    windows = [wave[start : start + SEGMENT_SAMPLES] for start in segment_starts(len(wave))]
    scores = [scored(label).score for label in teacher.label(windows)]  # centres 3.84, 4.78, 5.72, 6.66 s
    expected = [scores[i] for i in (0, 0, 0, 0, 1, 2, 3, 3, 3, 3, 3)]
    assert [score for _, score in timeline] == pytest.approx(expected, abs=1e-5)
    assert np.mean(scores) == pytest.approx(scored(teacher.label([wave])[0]).score, abs=1e-5)


def test_timeline_reports_silence(teacher: WindowScorer) -> None:
    wave = np.concatenate([np.zeros(10 * RATE, np.float32), noise(1)])
    scores = [score for _, score in teacher.timeline(wave)]
    assert scores[0] is None
    assert scores[-1] is not None
    with pytest.raises(Unscorable, match="silent"):
        teacher.timeline(wave[: 9 * RATE])


def test_load_scores_stereo_at_44100_hz_like_its_resampled_mean(teacher: WindowScorer) -> None:
    rng = np.random.default_rng(0)
    stereo = 0.1 * rng.standard_normal((88_200, 2))
    model = Model(load_teacher("distillmos", TeacherOptions(device="cpu")))
    expected = scored(teacher.label([audio.resample(stereo.mean(axis=1).astype(np.float32), 44_100)])[0]).score
    assert model(stereo, 44_100) == pytest.approx(expected, abs=1e-4)
    assert model(torch.from_numpy(stereo), 44_100) == pytest.approx(expected, abs=1e-4)
    assert isinstance(model.teacher, WindowScorer)


def test_load_takes_tensors_and_integers() -> None:
    model = speechdistill.load("distillmos", device="cpu")
    pcm = audio.quantise(noise(1))
    floats = torch.from_numpy(pcm / np.float32(32768))
    expected = model(floats, RATE)
    same = [pcm, torch.from_numpy(pcm), pcm.astype(np.int32) << 16, pcm / 32768.0, pcm[:, None]]
    for wave in (*same, floats.double(), floats.clone().requires_grad_(), floats[:, None].expand(-1, 2)):
        assert model(wave, RATE) == pytest.approx(expected, abs=1e-5)
    rounded = floats.bfloat16()
    assert model(rounded, RATE) == pytest.approx(model(rounded.float(), RATE), abs=1e-5)


@pytest.mark.parametrize(
    ("wave", "rate", "message"),
    [
        (np.zeros(RATE, np.float32), RATE, "silent"),
        (np.full(44_100, np.nan), 44_100, "NaN"),
        (np.full(RATE, 1e300), RATE, "infinite"),
        (np.zeros(0), 44_100, "no samples"),
        (noise(0.05), RATE, "shorter"),
        (np.zeros((2, RATE)), RATE, "transpose"),
        (np.zeros(()), RATE, "shape"),
        (np.zeros(RATE, np.uint8), RATE, "uint8"),
        (np.zeros(RATE, complex), RATE, "complex128"),
        (np.zeros(RATE), 0, "sample rate 0"),
        (np.zeros(RATE), float("nan"), "sample rate nan"),
    ],
)
def test_load_refuses_what_is_not_speech(teacher: WindowScorer, wave: np.ndarray, rate: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Model(teacher)(wave, rate)


def test_unknown_choices_are_answered_with_the_valid_ones() -> None:
    options: list[tuple[dict[str, Any], str]] = [
        ({"name": "dnsmos9"}, r"unknown; choose from \[.*'distillmos'"),
        ({"name": "distillmos", "dtype": "float16"}, "choose from .*float32.*bfloat16"),
        ({"name": "distillmos", "device": "gpu"}, "choose cpu, cuda"),
        ({"name": "distillmos", "batch_s": 0}, "above 0"),
    ]
    for choice, message in options:
        with pytest.raises(ValueError, match=message):
            speechdistill.load(**choice)


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_cuda_without_a_gpu_is_refused() -> None:
    with pytest.raises(ValueError, match="no CUDA device"):
        distillmos.load(TeacherOptions(device="cuda"))


def test_missing_weights_say_how_to_get_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere\.pt.*pip install --no-deps distillmos==0\.9\.1"):
        distillmos.load(TeacherOptions(weights=str(tmp_path / "nowhere.pt")))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match=r"pip install --no-deps distillmos==0\.9\.1"):
        distillmos.load()


def test_wrong_weights_files_are_refused_by_name(tmp_path: Path) -> None:
    released = torch.load(distillmos._released_weights(), weights_only=True)["model"]
    bias = "transformer_pool_attn.pool.linear3.bias"
    wrong: list[Any] = [
        {"model": {k: v for k, v in released.items() if k != bias}},
        {"model": released | {bias: torch.zeros(2)}},
        {"model": released | {"extra": torch.zeros(1)}},
        released,
        {"model": 3},
        [1],
        {"model": Path("code")},  # would have to be unpickled
    ]
    files = []
    for i, value in enumerate(wrong):
        files.append(tmp_path / f"wrong{i}.pt")
        torch.save(value, files[-1])
    for i, content in enumerate([b"", b"not a checkpoint", Path(distillmos._released_weights()).read_bytes()[:1000]]):
        files.append(tmp_path / f"torn{i}.pt")
        files[-1].write_bytes(content)
    for file in files:
        with pytest.raises(ValueError, match=f"{file.name}: not Distill-MOS v7 weights"):
            distillmos.load(TeacherOptions(weights=str(file)))


def test_provenance_names_the_weights_by_their_hash(teacher: WindowScorer) -> None:
    assert teacher.name == "distillmos"
    assert teacher.weights_hash == "b18b3ac60227267cfb91e5d00ce22cc7b73716fd92f269484da1446e27031a40"


def test_bfloat16_stays_within_a_hundredth_of_float32(teacher: WindowScorer, real_audio: Path) -> None:
    # This is the file that plain autocast of the whole network moves furthest, by 0.017.
    clean = audio.load(str(real_audio / "speech" / "3235-11599-0000.flac"))[:SEGMENT_SAMPLES]
    waves = [clean, clean + 0.2 * noise(len(clean) / RATE)]
    full = [scored(label).score for label in teacher.label(waves)]
    low = [
        scored(label).score for label in distillmos.load(TeacherOptions(device="cpu", dtype="bfloat16")).label(waves)
    ]
    assert low == pytest.approx(full, abs=0.01)
    assert low != pytest.approx(full, abs=1e-6)  # it did run in bfloat16


@pytest.mark.parametrize("num_samples", [1600, SEGMENT_SAMPLES - 2000])
def test_the_faster_convolutions_give_the_students_maps(teacher: WindowScorer, num_samples: int) -> None:
    path = distillmos._released_weights()
    plain = distillmos._network(Path(path).read_bytes(), path)
    waves = np.stack([audio.fit(wave, SEGMENT_SAMPLES) for wave in (noise(0.1), noise(8)[:num_samples])])
    with torch.inference_mode():
        spectra = features(torch.from_numpy(waves))
        torch.testing.assert_close(teacher.forward.network.cnn(spectra), plain.cnn(spectra), rtol=1e-4, atol=1e-4)
        silence = torch.zeros(1, 2, 161, 768)
        torch.testing.assert_close(teacher.forward.network.cnn(silence), plain.cnn(silence), rtol=1e-4, atol=1e-4)


def test_without_onednn_the_scores_are_the_same(teacher: WindowScorer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(student_scorer, "_has_fused", lambda dtype: False)
    expected = scored(teacher.label([noise(2)])[0]).score
    assert scored(distillmos.load(TeacherOptions(device="cpu")).label([noise(2)])[0]).score == pytest.approx(
        expected, abs=1e-5
    )


def test_global_state_of_torch_is_left_alone(teacher: WindowScorer) -> None:
    before = torch.get_num_threads(), torch.is_grad_enabled(), torch.is_inference_mode_enabled()
    distillmos.load(TeacherOptions(device="cpu", dtype="bfloat16")).label([noise(1)])
    after = torch.get_num_threads(), torch.is_grad_enabled(), torch.is_inference_mode_enabled()
    assert after == before
    assert not torch.is_autocast_enabled("cpu")


def test_neither_the_released_package_nor_torchaudio_is_imported() -> None:
    code = (
        "import sys; from speechdistill.models.load import load_teacher;"
        "from speechdistill.models.options import TeacherOptions; light = 'torch' not in sys.modules;"
        "load_teacher('distillmos', TeacherOptions(device='cpu'));"
        "print(light, {'distillmos', 'torchaudio', 'transformers'} & set(sys.modules))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "True set()"


PEAK_OF_LABELLING = """
import sys
from pathlib import Path
import torch
from speechdistill.io import audio
from speechdistill.models.networks.conv_transformer import ConvTransformer, ConvTransformerConfig
from speechdistill.models.options import TeacherOptions
from speechdistill.models.teachers import distillmos
torch.manual_seed(0)  # about one network in fifteen scores every crop the same
teacher = distillmos.load(TeacherOptions(device="cpu"))
teacher.forward.network = ConvTransformer(ConvTransformerConfig(2, 4, 2, 1, 1)).eval()  # small: streaming is measured
(label,) = teacher.label([audio.load(sys.argv[1])])
assert 1 <= label.score <= 5 and label.disagreement
# Not getrusage: its maximum is inherited from the process that forked this one.
status = Path("/proc/self/status").read_text()
print(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from Linux's /proc")
@pytest.mark.slow
def test_memory_does_not_grow_with_the_length(tmp_path: Path) -> None:
    peaks = {}
    for minutes in (5, 15):
        path = str(tmp_path / f"{minutes}.flac")
        soundfile.write(path, np.tile(noise(60), minutes), RATE)
        run = subprocess.run([sys.executable, "-c", PEAK_OF_LABELLING, path], stdout=subprocess.PIPE, check=True)
        peaks[minutes] = int(run.stdout)
    assert peaks[15] / peaks[5] <= 1.2, peaks

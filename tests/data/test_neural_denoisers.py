"""NSNet2, DeepFilterNet 3 and Demucs from files of their formats, with small random or constant networks in them."""

import io
import json
import random
import sys
import tarfile
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from scipy.signal import butter, sosfiltfilt

from manifests import clips, voice
from speechdistill.data import components, onnx_denoisers
from speechdistill.data.degradation import Neural, Scene
from speechdistill.data.degradations.denoisers import DeepFilterNet3, Demucs, NSNet2
from speechdistill.io import assets, audio
from speechdistill.io.assets import Asset

RATE = audio.SAMPLE_RATE
KINDS: dict[str, type[Neural]] = {"nsnet2": NSNet2, "deepfilternet3": DeepFilterNet3, "demucs": Demucs}
LENGTHS = (1, 2, 100, 159, 160, 321, 16_000, 122_880)
HIDDEN, BANDS, LOW, ORDER = 8, 32, 96, 5
CONFIG = """
[train]
model = deepfilternet3
[df]
sr = 48000
fft_size = 960
hop_size = 480
nb_erb = 32
nb_df = 96
norm_tau = 1
min_nb_erb_freqs = 2
df_order = 5
df_lookahead = 2
[deepfilternet]
conv_lookahead = 2
"""


def graph(inputs: dict[str, Any], outputs: dict[str, Any], nodes: list[Any], **weights: np.ndarray) -> bytes:
    def values(shapes: dict[str, Any]) -> list[Any]:
        return [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items()]

    held = [numpy_helper.from_array(np.asarray(value), name) for name, value in weights.items()]
    made = helper.make_graph(nodes, "graph", values(inputs), values(outputs), held)
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    return model.SerializeToString()


def node(kind: str, inputs: str, outputs: str, **attributes: Any) -> Any:
    return helper.make_node(kind, inputs.split(), outputs.split(), **attributes)


def weight(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32) / np.float32(np.sqrt(shape[-2]))


def nsnet2(gain: float | None = None, batch: int | str = "batch_size", bins: int = 161) -> bytes:
    """A recurrent layer between two others, or a constant gain."""
    shape = [batch, "frames", bins]
    if gain is not None:
        nodes = [node("Mul", "input zero", "nothing"), node("Add", "nothing gain", "output")]
        return graph({"input": shape}, {"output": shape}, nodes, zero=np.float32(0), gain=np.float32(gain))
    nodes = [
        node("MatMul", "input w", "small"),
        node("Transpose", "small", "by_time", perm=[1, 0, 2]),
        node("GRU", "by_time gru_w gru_r", "states", hidden_size=HIDDEN),
        node("Squeeze", "states one", "state"),
        node("Transpose", "state", "by_wave", perm=[1, 0, 2]),
        node("MatMul", "by_wave v", "logits"),
        node("Sigmoid", "logits", "output"),
    ]
    gates = {"gru_w": weight(1, 3 * HIDDEN, HIDDEN), "gru_r": weight(1, 3 * HIDDEN, HIDDEN, seed=1)}
    ends = {"w": weight(bins, HIDDEN), "v": weight(HIDDEN, bins, seed=2), "one": np.array([1])}
    return graph({"input": shape}, {"output": shape}, nodes, **gates, **ends)


def encoder() -> bytes:
    """Hidden values from both features, of a frame and the two before it."""
    past = {"kernel_shape": [3, 3], "pads": [2, 1, 0, 1]}
    nodes = [
        node("Conv", "feat_erb k", "e0", **past),
        node("Conv", "e0 half", "e1", strides=[1, 2]),
        node("Conv", "e1 half", "e2", strides=[1, 2]),
        node("Tanh", "e2", "e3"),
        node("Conv", "feat_spec c", "c0", **past),
        node("ReduceMean", "c0", "c_mean", axes=[3], keepdims=1),
        node("Add", "e3 c_mean", "both"),
        node("Transpose", "both", "by_time", perm=[0, 2, 1, 3]),
        node("Reshape", "by_time flat", "long"),
        node("MatMul", "long w", "unbounded"),
        node("Tanh", "unbounded", "emb"),
        node("MatMul", "emb v", "lsnr"),
    ]
    levels = {"e0": 32, "e1": 16, "e2": 8, "e3": 8, "c0": 96}
    outputs = {name: [1, 2, "S", width] for name, width in levels.items()}
    outputs |= {"emb": [1, "S", HIDDEN], "lsnr": [1, "S", 1]}
    return graph(
        {"feat_erb": [1, 1, "S", 32], "feat_spec": [1, 2, "S", 96]},
        outputs,
        nodes,
        k=weight(2, 1, 3, 3),
        c=weight(2, 2, 3, 3, seed=1),
        half=weight(2, 2, 1, 1, seed=2),
        flat=np.array([0, 0, -1]),
        w=weight(16, HIDDEN, seed=3),
        v=weight(HIDDEN, 1, seed=4),
    )


def erb_decoder(gains: np.ndarray | None) -> bytes:
    hidden = {"emb": [1, "S", HIDDEN], "e3": [1, 2, "S", 8], "e2": [1, 2, "S", 8], "e1": [1, 2, "S", 16]}
    nodes = [node("MatMul", "emb w", "a"), node("Add", "a b", "c"), node("Unsqueeze", "c one", "m")]
    w = weight(HIDDEN, BANDS, seed=5) if gains is None else np.zeros((HIDDEN, BANDS), np.float32)
    b = np.full(BANDS, 0.5) if gains is None else gains
    held = {"w": w, "b": b.astype(np.float32), "one": np.array([1])}
    return graph({**hidden, "e0": [1, 2, "S", 32]}, {"m": [1, 1, "S", BANDS]}, nodes, **held)


def df_decoder(tap: int | None) -> bytes:
    """Filters of one tap, or random ones."""
    constant = np.zeros((LOW, ORDER, 2), np.float32)
    constant[:, tap or 0, 0] = 1
    width = constant.size
    held = {"w": weight(HIDDEN, width, seed=6) if tap is None else np.zeros((HIDDEN, width), np.float32)}
    nodes = [node("MatMul", "emb w", "a"), node("Add", "a b", "d"), node("Reshape", "d shape", "coefs")]
    inputs = {"emb": [1, "S", HIDDEN], "c0": [1, 2, "S", LOW]}
    shape = np.array([0, 0, LOW, 2 * ORDER])
    return graph(inputs, {"coefs": [1, "S", LOW, 2 * ORDER]}, nodes, **held, b=constant.reshape(-1), shape=shape)


def deepfilternet3(gains: np.ndarray | None = None, tap: int | None = None, **changes: str) -> bytes:
    config = CONFIG
    for name, value in changes.items():
        lines = [f"{name} = {value}" if line.startswith(f"{name} =") else line for line in config.splitlines()]
        config = "\n".join(lines)
    graphs = {"enc.onnx": encoder(), "erb_dec.onnx": erb_decoder(gains), "df_dec.onnx": df_decoder(tap)}
    return archive({**graphs, "config.ini": config.encode()})


def archive(files: dict[str, bytes]) -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as tar:
        folder = tarfile.TarInfo("tmp/export")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        for name, data in files.items():
            member = tarfile.TarInfo(f"tmp/export/{name}")  # as in the official one
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return packed.getvalue()


def demucs(hidden: int = 4) -> bytes:
    kind = pytest.importorskip("denoiser.demucs").Demucs
    with torch.random.fork_rng():
        torch.manual_seed(0)
        state = kind(hidden=hidden).state_dict()
    saved = io.BytesIO()
    torch.save(state, saved, _use_new_zipfile_serialization=False)  # the weights are from 2020
    return saved.getvalue()


def step_of(name: str, path: Path, data: bytes) -> Neural:
    path.write_bytes(data)
    return KINDS[name](*assets.looked_up(KINDS[name].need, str(path)))


@pytest.fixture(scope="module", params=KINDS)
def step(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Neural:
    made = {"nsnet2": nsnet2, "deepfilternet3": deepfilternet3, "demucs": demucs}[request.param]()
    return step_of(request.param, tmp_path_factory.mktemp("weights") / request.param, made)


def network(step: Neural) -> Any:
    return step.load(Path(step.weights), "cpu")


# All three


@pytest.mark.parametrize("num_samples", LENGTHS)
def test_any_wave_comes_out_finite_and_of_its_length(step: Neural, num_samples: int) -> None:
    white = np.random.default_rng(0).standard_normal(num_samples)
    for wave in (0 * white, 1e-30 * white, white, 300 * white, 1 + 0 * white):
        given = wave.astype(np.float32)
        given.setflags(write=False)
        denoised = step.apply(given)
        assert denoised.shape == given.shape and denoised.dtype == np.float32 and np.isfinite(denoised).all()


def test_a_wave_does_not_depend_on_its_batch(step: Neural) -> None:
    waves = np.stack([voice(1.0, seed=seed) for seed in range(3)])
    found = network(step)
    together = step.apply_batch(found, waves)
    assert np.abs(together).max(axis=1).min() > 0.01
    for wave, denoised in zip(waves, together, strict=True):
        np.testing.assert_allclose(step.apply_batch(found, wave[None])[0], denoised, atol=1e-4)
        np.testing.assert_allclose(step.apply(wave), denoised, atol=1e-4)


def test_json_brings_back_the_step_and_its_effect(step: Neural) -> None:
    again = components.from_json(json.loads(json.dumps(components.to_json(step))))
    assert again == step and again.clip_ids() == ()
    np.testing.assert_array_equal(again.apply(voice(0.3)), step.apply(voice(0.3)))


@pytest.mark.parametrize("name", KINDS)
def test_the_component_finds_its_weights(name: str) -> None:
    (need,) = components.component(f"denoisers.{name}").needs
    assert need == KINDS[name].need and need.name == name and need.where.startswith("https://")
    scene = Scene("c", None, RATE, clips(), assets={name: Asset("/w/file", "ab")})
    assert components.component(f"denoisers.{name}").draw(np.random.default_rng(0), scene) == KINDS[name](
        "/w/file", "ab"
    )


def test_no_global_state_changes(step: Neural) -> None:
    def state() -> list[object]:
        numpy_state = np.random.get_state()  # noqa: NPY002
        flags = (torch.get_num_threads(), torch.is_grad_enabled(), torch.get_default_device())
        cudnn = (torch.backends.cudnn.enabled, torch.backends.cudnn.allow_tf32)
        return [numpy_state[1].tobytes(), random.getstate(), torch.random.get_rng_state().tolist(), flags, cudnn]

    before = state()
    step.apply_batch(network(step), voice(0.2)[None])
    assert state() == before


@pytest.mark.parametrize("name", KINDS)
def test_what_are_no_such_weights_is_refused(name: str, tmp_path: Path) -> None:
    if name == "demucs":
        pytest.importorskip("denoiser")
    pickled = io.BytesIO()
    torch.save({"encoder.0.0.weight": torch.zeros(4, 1, 8)}, pickled)
    other = nsnet2(bins=513) if name == "nsnet2" else nsnet2()
    for data in (b"", b"no weights", other, archive({"enc.onnx": encoder()}), pickled.getvalue()):
        file = tmp_path / "given.bin"
        with pytest.raises(ValueError, match=rf"given\.bin is not {KINDS[name].need.what}: .+"):
            step_of(name, file, data).apply(voice(0.1))


# NSNet2


def test_nsnet2_with_gains_of_one_changes_nothing(tmp_path: Path) -> None:
    step = step_of("nsnet2", tmp_path / "one.onnx", nsnet2(gain=1.0))
    for num_samples in LENGTHS:
        wave = np.random.default_rng(0).standard_normal(num_samples).astype(np.float32)
        np.testing.assert_allclose(step.apply(wave), wave, atol=1e-5)


@pytest.mark.parametrize(("gain", "applied"), [(0.25, 0.25), (7.0, 1.0), (-1.0, 1e-4)])
def test_nsnet2_gains_are_from_minus_80_to_0_db(tmp_path: Path, gain: float, applied: float) -> None:
    wave = voice(0.5)
    denoised = step_of("nsnet2", tmp_path / "gain.onnx", nsnet2(gain=gain)).apply(wave)
    np.testing.assert_allclose(denoised, applied * wave, atol=1e-5 * applied)


def test_nsnet2_hears_log_powers_of_20_ms(tmp_path: Path) -> None:
    """A graph whose gain is -1/10 of the level of its own frequency."""
    shape = {"input": [1, "frames", 161]}
    data = graph(shape, {"output": [1, "frames", 161]}, [node("Mul", "input k", "output")], k=np.float32(-0.1))
    step = step_of("nsnet2", tmp_path / "levels.onnx", data)
    click = np.zeros(RATE, np.float32)
    click[8000] = 1e-3  # in the middle of a frame, where the window is 1, and at the ends of its neighbours
    expected = -0.1 * np.log10(1e-3**2) * click
    np.testing.assert_allclose(step.apply(click), expected, atol=1e-7)


def test_nsnet2_of_a_batch_of_one_takes_wave_by_wave(tmp_path: Path) -> None:
    waves = np.stack([voice(0.5, seed=seed) for seed in range(3)])
    one, many = (step_of("nsnet2", tmp_path / f"{b}.onnx", nsnet2(batch=b)) for b in (1, "any"))
    np.testing.assert_allclose(one.apply_batch(network(one), waves), many.apply_batch(network(many), waves), atol=1e-6)


# DeepFilterNet 3


def speech_below(hz: float, seconds: float = 1.0) -> np.ndarray:
    return sosfiltfilt(butter(12, hz, fs=RATE, output="sos"), voice(seconds)).astype(np.float32)


def test_deep_filter_with_gains_and_middle_taps_of_one_changes_nothing(tmp_path: Path) -> None:
    step = step_of("deepfilternet3", tmp_path / "one.tar.gz", deepfilternet3(np.ones(BANDS), tap=2))
    for num_samples in (12_345, 16_000, 122_880):
        wave = speech_below(6000, 8.0)[:num_samples] * np.sin(np.linspace(0, np.pi, num_samples), dtype=np.float32)
        np.testing.assert_allclose(step.apply(wave), wave, atol=1e-3)


@pytest.mark.parametrize("tap", range(ORDER))
def test_deep_filter_taps_are_two_frames_before_to_two_after(tmp_path: Path, tap: int) -> None:
    step = step_of("deepfilternet3", tmp_path / f"{tap}.tar.gz", deepfilternet3(np.zeros(BANDS), tap=tap))
    wave = speech_below(3000, 2.0)
    shifted = np.roll(wave, (2 - tap) * RATE // 100)  # a frame is 10 ms
    np.testing.assert_allclose(step.apply(wave)[1000:-1000], shifted[1000:-1000], atol=2e-3)


def test_deep_filter_gains_are_for_erb_bands_above_the_filtered_frequencies(tmp_path: Path) -> None:
    """Bands begin at 0, 100, ... 1300, 1550 ... 5400, 6300 Hz; those below 4.8 kHz do not matter."""
    gains = np.ones(BANDS)
    gains[[5, 22]] = 0
    step = step_of("deepfilternet3", tmp_path / "gains.tar.gz", deepfilternet3(gains, tap=2))
    time_s = np.arange(RATE) / RATE
    for hz, passes in ((550, True), (4700, True), (5200, True), (5700, False), (6100, False), (6600, True)):
        tone = np.sin(2 * np.pi * hz * time_s).astype(np.float32)
        level = np.sqrt(2 * np.mean(step.apply(tone)[4000:12_000] ** 2))
        assert level == pytest.approx(float(passes), abs=0.02), hz


ERB_WIDTHS = [2] * 13 + [5, 5, 7, 7, 8, 10, 12, 13, 15, 18, 20, 24, 28, 31, 37, 42, 50, 56, 67]  # libdf's


@pytest.fixture
def deep_filter(tmp_path: Path) -> Any:
    return network(step_of("deepfilternet3", tmp_path / "any.tar.gz", deepfilternet3()))


def spectra(wave: np.ndarray, deep_filter: Any) -> np.ndarray:
    return onnx_denoisers._stft(wave[None], deep_filter.window)[0] / len(deep_filter.window)


def test_deep_filter_features_are_normalised_by_running_means(deep_filter: Any) -> None:
    assert deep_filter.widths.tolist() == ERB_WIDTHS and deep_filter.alpha == 0.99
    spectrum = spectra(audio.resample(voice(1.0), RATE, 48_000), deep_filter)
    levels, parts = onnx_denoisers._features(deep_filter, spectrum)
    mean, magnitude = np.linspace(-60, -90, BANDS), np.linspace(0.001, 0.0001, LOW)
    edges = np.concatenate([[0], np.cumsum(ERB_WIDTHS)])
    for t, frame in enumerate(spectrum):
        powers = [np.mean(np.abs(frame[a:b]) ** 2) for a, b in pairwise(edges)]
        db = 10 * np.log10(np.array(powers) + 1e-10)
        mean = 0.01 * db + 0.99 * mean
        magnitude = 0.01 * np.abs(frame[:LOW]) + 0.99 * magnitude
        if t >= 2:  # a frame is given what is known two frames later
            unit = frame[:LOW] / np.sqrt(magnitude)
            np.testing.assert_allclose(levels[0, t - 2], (db - mean) / 40, atol=1e-4)
            np.testing.assert_allclose(parts[:, t - 2], [unit.real, unit.imag], atol=1e-4)
    assert not levels[:, -2:].any() and not parts[:, -2:].any()


def test_deep_filter_features_are_those_of_libdf(deep_filter: Any) -> None:
    libdf = pytest.importorskip("libdf")
    wave = audio.resample(voice(2.0), RATE, 48_000)
    state = libdf.DF(48_000, 960, 480, BANDS, 2)
    theirs = state.analysis(wave[None])
    ours = spectra(wave, deep_filter)
    frames = theirs.shape[1]
    np.testing.assert_allclose(ours[:frames], theirs[0], atol=1e-6)
    levels, parts = onnx_denoisers._features(deep_filter, ours)
    their_levels = libdf.erb_norm(libdf.erb(theirs, state.erb_widths()), 0.99)
    unit = libdf.unit_norm(theirs[..., :LOW].copy(), 0.99)
    np.testing.assert_allclose(levels[0, : frames - 2], their_levels[0, 2:], atol=1e-4)
    np.testing.assert_allclose(parts[:, : frames - 2], np.stack([unit[0].real, unit[0].imag])[:, 2:], atol=1e-4)


def test_long_silence_stays_finite(deep_filter: Any) -> None:
    spectrum = np.zeros((2_000, 481), np.complex64)
    forgetful = deep_filter._replace(alpha=0.5)  # its running means come to 0, as they would in a quarter of an hour
    assert all(np.isfinite(feature).all() for feature in onnx_denoisers._features(forgetful, spectrum))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"model": "deepfilternet2"}, "deepfilternet2"),
        ({"hop_size": "240"}, "240"),
        ({"nb_df": "64"}, "."),
        ({"sr": "x"}, "x"),
    ],
)
def test_another_configuration_is_refused(tmp_path: Path, changes: dict[str, str], reason: str) -> None:
    with pytest.raises(ValueError, match=rf"other\.tar\.gz is not .*: .*{reason}"):
        step_of("deepfilternet3", tmp_path / "other.tar.gz", deepfilternet3(**changes)).apply(voice(0.1))


# Demucs


def test_demucs_is_the_package_s(tmp_path: Path) -> None:
    data = demucs(hidden=6)
    reference = sys.modules["denoiser.demucs"].Demucs(hidden=6).eval()
    reference.load_state_dict(torch.load(io.BytesIO(data), weights_only=True))
    wave = voice(0.7)
    with torch.inference_mode():
        expected = reference(torch.from_numpy(wave[None]))[0, 0].numpy()
    np.testing.assert_allclose(step_of("demucs", tmp_path / "w.th", data).apply(wave), expected, atol=1e-6)


def test_without_its_package_demucs_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "denoiser.demucs", None)
    (tmp_path / "w.th").write_bytes(b"")
    for fails in (
        lambda: Demucs.load(tmp_path / "w.th", "cpu"),
        lambda: components.component("denoisers.demucs").check(),
    ):
        with pytest.raises(ImportError, match="pip install --no-deps denoiser"):
            fails()
    components.component("denoisers.nsnet2").check()

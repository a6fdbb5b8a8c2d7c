"""NISQA as a teacher: small random networks in the format of its file, against what torchmetrics makes of them."""

from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import torch

from manifests import voice
from speechdistill.comparing import candidates, paper
from speechdistill.io import audio
from speechdistill.models.label import Label
from speechdistill.models.load import load_teacher
from speechdistill.models.options import TeacherOptions
from speechdistill.models.teachers import nisqa
from speechdistill.models.teachers.nisqa import Network

RATE = audio.SAMPLE_RATE
RELEASED = {  # of the released file's `args`, what decides
    "ms_sr": None,
    "ms_fmax": 20000,
    "ms_n_fft": 4096,
    "ms_hop_length": 0.01,
    "ms_win_length": 0.02,
    "ms_n_mels": 48,
    "ms_seg_length": 15,
    "ms_seg_hop_length": 4,
    "ms_max_segments": 1300,
    "cnn_c_out_1": 16,
    "cnn_c_out_2": 32,
    "cnn_c_out_3": 64,
    "cnn_kernel_size": (3, 3),
    "cnn_dropout": 0.2,
    "cnn_pool_1": [24, 7],
    "cnn_pool_2": [12, 5],
    "cnn_pool_3": [6, 3],
    "td_sa_d_model": 64,
    "td_sa_nhead": 1,
    "td_sa_num_layers": 2,
    "td_sa_h": 64,
    "td_sa_dropout": 0.1,
    "pool_att_h": 128,
    "pool_att_dropout": 0,
}
SMALL = RELEASED | {
    "cnn_c_out_1": 4,
    "cnn_c_out_2": 6,
    "cnn_c_out_3": 8,
    "td_sa_d_model": 12,
    "td_sa_nhead": 2,
    "td_sa_h": 10,
    "pool_att_h": 14,
}
# MOS of GAIN * voice(SECONDS, seed=SEED) by `checkpoint(SMALL)`, from torchmetrics 1.9.0 (librosa 0.11.0, torch 2.13).
BY_TORCHMETRICS = {
    (1.0, 0.15, 0): 2.638179,
    (1.0, 1.0, 1): 2.594851,
    (0.003, 2.345, 2): 2.580996,
    (1.0, 9.0, 3): 2.565981,
}


def shapes(args: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """The tensors of a file of NISQA's."""
    first, second, third = (args[f"cnn_c_out_{i}"] for i in (1, 2, 3))
    width, neurons, hidden = args["td_sa_d_model"], args["td_sa_h"], args["pool_att_h"]
    height, last = args["cnn_pool_3"]
    found: dict[str, tuple[int, ...]] = {}

    def layer(name: str, *weight: int) -> None:
        found.update({f"{name}.weight": weight, f"{name}.bias": weight[:1]})

    for i, (out, inner) in enumerate(
        [(first, 1), (second, first), (third, second), (third, third), (third, third), (third, third)], 1
    ):
        layer(f"cnn.model.conv{i}", out, inner, 3, last if i == 6 else 3)
        layer(f"cnn.model.bn{i}", out)
        found |= {f"cnn.model.bn{i}.running_mean": (out,), f"cnn.model.bn{i}.running_var": (out,)}
        found[f"cnn.model.bn{i}.num_batches_tracked"] = ()
    layer("time_dependency.model.norm1", width)
    layer("time_dependency.model.linear", width, third * height)
    for i in range(args["td_sa_num_layers"]):
        block = f"time_dependency.model.layers.{i}"
        found |= {f"{block}.self_attn.in_proj_weight": (3 * width, width)}
        found |= {f"{block}.self_attn.in_proj_bias": (3 * width,)}
        layer(f"{block}.self_attn.out_proj", width, width)
        layer(f"{block}.linear1", neurons, width)
        layer(f"{block}.linear2", width, neurons)
        layer(f"{block}.norm1", width)
        layer(f"{block}.norm2", width)
    for i in range(5):
        layer(f"pool_layers.{i}.model.linear1", hidden, width)
        layer(f"pool_layers.{i}.model.linear2", 1, hidden)
        layer(f"pool_layers.{i}.model.linear3", 1, width)
    return found


def checkpoint(args: dict[str, Any]) -> dict[str, Any]:
    """A file of NISQA's, of random weights that any version of torch gives."""
    rng = np.random.default_rng(5)
    state = {}
    for name, shape in shapes(args).items():
        values = rng.uniform(-1, 1, shape) / np.sqrt(max(1, np.prod(shape[1:])))
        if name.endswith((".running_var", "norm1.weight", "norm2.weight")) or (".bn" in name and "weight" in name):
            values = 1 + 0.5 * rng.random(shape)
        elif name.endswith("linear3.bias"):
            values = np.full(shape, 2.0)
        elif ".conv" in name and "weight" in name:
            values -= values.mean((2, 3), keepdims=True)  # hears contrasts, not levels
        elif name.endswith("bias"):
            values *= 0.1
        state[name] = torch.tensor(values, dtype=torch.float32 if shape else torch.int64)
    return {"args": args | {"name": "small", "now": None}, "model_state_dict": state}


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("nisqa") / "nisqa.tar"
    torch.save(checkpoint(SMALL), path)
    return str(path)


def score(label: object) -> float:
    assert isinstance(label, Label), label
    return label.score


def test_it_scores_what_torchmetrics_does(weights: str) -> None:
    teacher = nisqa.load(TeacherOptions(weights=weights, device="cpu"))
    waves = [np.float32(gain) * voice(seconds, seed=seed) for gain, seconds, seed in BY_TORCHMETRICS]
    labels = teacher.label(waves)
    assert [score(label) for label in labels] == pytest.approx(list(BY_TORCHMETRICS.values()), abs=3e-5)
    assert (teacher.name, teacher.intrusive, len(teacher.weights_hash)) == ("nisqa", False, 64)


def test_the_released_weights_score_as_their_authors_say() -> None:
    """The MOS of tones of 1 s, from torchmetrics' tests, which had them from NISQA itself."""
    try:
        teacher = nisqa.load(TeacherOptions(device="cpu"))
    except FileNotFoundError as error:
        pytest.skip(str(error))
    tones = [np.sin(2 * 3.14159 * hertz / RATE * np.arange(RATE)).astype(np.float32) for hertz in (440, 1000)]
    assert [score(label) for label in teacher.label(tones)] == pytest.approx([1.1244, 1.2762], abs=1e-3)


def test_it_has_the_parameters_of_the_paper() -> None:
    with torch.device("meta"):
        network = Network(RELEASED)
    missing = set(network.state_dict()) ^ {name.replace(".model.", ".") for name in shapes(RELEASED)}
    assert not missing
    millions = sum(parameter.numel() for parameter in network.parameters()) / 1e6
    assert round(millions, 2) == paper.rows()["nisqa"].params_m


def test_a_mixed_batch_scores_each_wave_as_if_alone(weights: str) -> None:
    waves = [voice(s, seed=i) for i, s in enumerate((1.0, 0.5, 1.0, 0.11))]  # the last is repeated: a segment is 0.14 s
    alone = [score(nisqa.load(TeacherOptions(weights=weights, device="cpu")).label([wave])[0]) for wave in waves]
    *together, silent = nisqa.load(TeacherOptions(weights=weights, device="cpu", batch_s=4 * 7.68)).label(
        [*waves, np.zeros(RATE, np.float32)]
    )
    assert [score(label) for label in together] == pytest.approx(alone, abs=1e-5)
    assert len({round(one, 3) for one in alone}) > 2 and str(silent).startswith("silent")


def test_longer_than_nisqa_allows_is_judged_in_windows(weights: str) -> None:
    teacher = nisqa.load(TeacherOptions(weights=weights, device="cpu", hop_s=7.68))
    wave = np.concatenate([voice(7.68, seed=i) * 0.3**i for i in range(7)])  # 53.8 s
    windows = [score(label) for label in teacher.label(np.split(wave, 7))]
    (label,) = teacher.label([wave])
    assert score(label) == pytest.approx(np.mean(windows), abs=1e-4)
    assert isinstance(label, Label) and label.disagreement == pytest.approx(np.std(windows), abs=1e-4)
    assert len({value for _, value in teacher.timeline(wave)}) == 7


def test_a_comparison_takes_its_weights_by_path_or_url(weights: str, tmp_path: Path) -> None:
    fsspec.filesystem("memory").pipe_file("/nisqa.tar", Path(weights).read_bytes())
    for place in (weights, "memory://nisqa.tar"):
        (model,) = candidates.load({"nisqa": "nisqa"}, str(tmp_path), {"nisqa": place})
        assert model.series == candidates.BASELINE and paper.row_of(model.name) == "nisqa"
        assert model.parameters == sum(
            np.prod(shape, dtype=int) for name, shape in shapes(SMALL).items() if "running" not in name and shape
        )


def test_what_is_missing_or_wrong_is_told(weights: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="'nisqa' is float32"):
        load_teacher("nisqa", TeacherOptions(weights=weights, device="cpu", dtype="bfloat16"))
    (tmp_path / "torn.tar").write_bytes(Path(weights).read_bytes()[:1000])
    torch.save(checkpoint(SMALL)["model_state_dict"], tmp_path / "bare.tar")
    torch.save(checkpoint(SMALL) | {"args": SMALL | {"pool_att_h": 9}}, tmp_path / "other.tar")
    torch.save(checkpoint(SMALL) | {"args": SMALL | {"ms_sr": 48000}}, tmp_path / "rate.tar")
    for name, reason in (("torn", ""), ("bare", "'args'"), ("other", ".*size mismatch"), ("rate", ".* 48000 Hz")):
        with pytest.raises(ValueError, match=rf"{name}\.tar: not NISQA's weights \({reason}"):
            nisqa.load(TeacherOptions(weights=str(tmp_path / f"{name}.tar"), device="cpu"))
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(
        FileNotFoundError, match=r"nisqa\.tar: no weights of NISQA there; give https.*not for commercial"
    ):
        nisqa.load(TeacherOptions(device="cpu"))

"""UTMOS as a teacher: small random networks in the format of SpeechMOS's file, against what its parts are in torch."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from manifests import voice
from speechdistill.comparing import candidates, paper
from speechdistill.io import audio
from speechdistill.models.label import Label
from speechdistill.models.load import load_teacher
from speechdistill.models.options import TeacherOptions
from speechdistill.models.teachers import utmos

RATE = audio.SAMPLE_RATE
STRIDES = (5, 2, 2, 2, 2, 2, 2)
SMALL = {"width": 128, "neurons": 40, "blocks": 2, "conv": 24, "embedding": 6, "hidden": 10, "projection": 14}


def shapes(
    width: int = 768,
    neurons: int = 3072,
    blocks: int = 12,
    conv: int = 512,
    embedding: int = 128,
    hidden: int = 512,
    projection: int = 2048,
) -> dict[str, tuple[int, ...]]:
    """The tensors of SpeechMOS's utmos22_strong; without arguments of the released file."""
    found: dict[str, tuple[int, ...]] = {"domain_emb": (1, embedding), "judge_emb": (1, embedding)}

    def layer(name: str, *weight: int) -> None:
        found.update({f"{name}.weight": weight, f"{name}.bias": weight[:1]})

    for i, kernel in enumerate((10, 3, 3, 3, 3, 2, 2)):
        found[f"wav2vec2.feature_extractor.conv_layers.{i}.0.weight"] = (conv, conv if i else 1, kernel)
    layer("wav2vec2.feature_extractor.conv_layers.0.2", conv)
    layer("wav2vec2.layer_norm", conv)
    layer("wav2vec2.post_extract_proj", width, conv)
    found["wav2vec2.mask_emb"] = (width,)
    found["wav2vec2.encoder.pos_conv.0.bias"] = (width,)
    found["wav2vec2.encoder.pos_conv.0.weight_g"] = (1, 1, 128)
    found["wav2vec2.encoder.pos_conv.0.weight_v"] = (width, width // 16, 128)
    layer("wav2vec2.encoder.layer_norm", width)
    for i in range(blocks):
        block = f"wav2vec2.encoder.layers.{i}"
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            layer(f"{block}.self_attn.{name}", width, width)
        layer(f"{block}.self_attn_layer_norm", width)
        layer(f"{block}.fc1", neurons, width)
        layer(f"{block}.fc2", width, neurons)
        layer(f"{block}.final_layer_norm", width)
    for direction in ("", "_reverse"):
        found[f"blstm.weight_ih_l0{direction}"] = (4 * hidden, width + 2 * embedding)
        found[f"blstm.weight_hh_l0{direction}"] = (4 * hidden, hidden)
        found |= {f"blstm.bias_{which}_l0{direction}": (4 * hidden,) for which in ("ih", "hh")}
    layer("projection.0", projection, 2 * hidden)
    layer("projection.2", 1, projection)
    return found


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    found = {}
    for name, shape in shapes(**SMALL).items():
        values = torch.randn(shape, generator=generator)
        norm = name.endswith("norm.weight") or name.endswith("0.2.weight")
        found[name] = 1 + 0.3 * values if norm else values * 2 / np.sqrt(max(2, np.prod(shape[1:])))
    found["wav2vec2.encoder.pos_conv.0.weight_g"].abs_().mul_(8)
    found["projection.2.weight"] *= 0.3
    return found


@pytest.fixture(scope="module")
def weights(state: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("utmos") / "utmos22_strong_step7459_v1.pt"
    torch.save(state, path)
    return str(path)


def by_hand(state: dict[str, Tensor], wave: np.ndarray) -> float:
    """The score of one wave, from torch's own parts: wav2vec 2.0 base with its norms after the sums, and the head."""

    def of(name: str) -> tuple[Tensor, Tensor]:
        return state[f"{name}.weight"], state[f"{name}.bias"]

    def normed(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], *of(name))

    x = torch.from_numpy(wave)[None, None]
    for i, stride in enumerate(STRIDES):
        x = F.conv1d(x, state[f"wav2vec2.feature_extractor.conv_layers.{i}.0.weight"], stride=stride)
        if i == 0:
            x = F.group_norm(x, x.shape[1], *of("wav2vec2.feature_extractor.conv_layers.0.2"))
        x = F.gelu(x)
    x = F.linear(normed(x.transpose(1, 2), "wav2vec2.layer_norm"), *of("wav2vec2.post_extract_proj"))
    place = "wav2vec2.encoder.pos_conv.0"
    kernel = torch._weight_norm(state[f"{place}.weight_v"], state[f"{place}.weight_g"], 2)
    around = F.conv1d(x.transpose(1, 2), kernel, state[f"{place}.bias"], padding=64, groups=16)[..., :-1]
    x = normed(x + F.gelu(around).transpose(1, 2), "wav2vec2.encoder.layer_norm")
    for i in range(SMALL["blocks"]):
        block = f"wav2vec2.encoder.layers.{i}"
        q, k, v = (
            F.linear(x, *of(f"{block}.self_attn.{name}_proj")).unflatten(2, (-1, 64)).transpose(1, 2) for name in "qkv"
        )
        heard = (q @ k.transpose(2, 3) / 8).softmax(-1) @ v
        x = x + F.linear(heard.transpose(1, 2).flatten(2), *of(f"{block}.self_attn.out_proj"))
        x = normed(x, f"{block}.self_attn_layer_norm")
        x = x + F.linear(F.gelu(F.linear(x, *of(f"{block}.fc1"))), *of(f"{block}.fc2"))
        x = normed(x, f"{block}.final_layer_norm")
    asked = [state[name].expand(1, x.shape[1], -1) for name in ("domain_emb", "judge_emb")]
    lstm = nn.LSTM(SMALL["width"] + 2 * SMALL["embedding"], SMALL["hidden"], batch_first=True, bidirectional=True)
    lstm.load_state_dict({name.removeprefix("blstm."): value for name, value in state.items() if "blstm" in name})
    frames = F.linear(lstm(torch.cat([x, *asked], 2))[0], *of("projection.0")).relu()
    return float(F.linear(frames, *of("projection.2")).mean() * 2 + 3)


def score(label: object) -> float:
    assert isinstance(label, Label), label
    return label.score


def test_it_scores_what_its_parts_do(weights: str, state: dict[str, Tensor]) -> None:
    teacher = utmos.load(TeacherOptions(weights=weights, device="cpu"))
    waves = [
        voice(0.1),
        voice(1.0, seed=1),
        voice(1.01, seed=1),
        3 * voice(2.345, seed=2),
        np.float32(0.003) * voice(0.7),
    ]
    with torch.inference_mode():
        expected = [by_hand(state, wave) for wave in waves]
    assert all(1 < one < 5 for one in expected) and len({round(one, 2) for one in expected}) > 2
    assert [score(label) for label in teacher.label(waves)] == pytest.approx(expected, abs=1e-4)
    assert (teacher.name, teacher.intrusive, len(teacher.weights_hash)) == ("utmos", False, 64)


def test_it_has_the_parameters_of_the_paper() -> None:
    network = utmos.network({name: torch.empty(shape, device="meta") for name, shape in shapes().items()})
    millions = sum(parameter.numel() for parameter in network.parameters()) / 1e6
    assert round(millions) == paper.rows()["utmos"].params_m
    assert network.encoder.model.config.num_attention_heads == 12


def test_a_mixed_batch_scores_each_wave_as_if_alone(weights: str) -> None:
    waves = [voice(s, seed=i) for i, s in enumerate((1.0, 0.5, 1.0, 0.3))]
    alone = [score(utmos.load(TeacherOptions(weights=weights, device="cpu")).label([wave])[0]) for wave in waves]
    *together, silent = utmos.load(TeacherOptions(weights=weights, device="cpu", batch_s=4 * 7.68)).label(
        [*waves, np.zeros(RATE, np.float32)]
    )
    assert [score(label) for label in together] == pytest.approx(alone, abs=1e-5)
    assert str(silent).startswith("silent")


def test_a_long_wave_is_judged_in_windows(weights: str) -> None:
    teacher = utmos.load(TeacherOptions(weights=weights, device="cpu", hop_s=7.68))
    wave = np.concatenate([voice(7.68, seed=i) for i in range(4)])  # 30.7 s
    windows = [score(label) for label in teacher.label(np.split(wave, 4))]
    assert score(teacher.label([wave])[0]) == pytest.approx(np.mean(windows), abs=1e-5)
    (whole,) = teacher.label([wave[: 30 * RATE]])
    assert isinstance(whole, Label) and whole.disagreement is None


def test_a_comparison_takes_its_weights(weights: str, state: dict[str, Tensor], tmp_path: Path) -> None:
    (model,) = candidates.load({"utmos": "utmos"}, str(tmp_path), {"utmos": weights})
    kept = {name: tensor for name, tensor in state.items() if "mask" not in name and not name.endswith("_g")}
    assert model.parameters == sum(tensor.numel() for tensor in kept.values())
    assert model.series == candidates.BASELINE and paper.row_of(model.name) == "utmos"


def test_what_is_missing_or_wrong_is_told(
    weights: str, state: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match="'utmos' is float32"):
        load_teacher("utmos", TeacherOptions(weights=weights, device="cpu", dtype="bfloat16"))
    (tmp_path / "torn.pt").write_bytes(Path(weights).read_bytes()[:1000])
    torch.save({"other": torch.zeros(1)}, tmp_path / "other.pt")
    torch.save([1], tmp_path / "list.pt")
    torch.save(state | {"extra": torch.zeros(1)}, tmp_path / "more.pt")
    torch.save({name: value for name, value in state.items() if "fc2" not in name}, tmp_path / "less.pt")
    for name in ("torn", "other", "list", "more", "less"):
        with pytest.raises(ValueError, match=f"{name}.pt: not UTMOS's weights"):
            utmos.load(TeacherOptions(weights=str(tmp_path / f"{name}.pt"), device="cpu"))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"v1\.pt: no weights of UTMOS there; give https://github.*411 MB, MIT"):
        utmos.load(TeacherOptions(device="cpu"))

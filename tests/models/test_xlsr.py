"""XLS-R as a teacher: the blocks that are wanted and no more, the original head, batches as each wave alone."""

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from safetensors.torch import load_file

from small_models import xlsr as small_xlsr
from small_models import xlsr_head
from speechdistill import cli
from speechdistill.io import audio
from speechdistill.labelling.teach import Teach
from speechdistill.models.label import Label
from speechdistill.models.load import load_teacher
from speechdistill.models.model import Model
from speechdistill.models.networks import speech_encoder
from speechdistill.models.networks.conv_transformer import QualityHead
from speechdistill.models.options import TeacherOptions
from speechdistill.models.teachers import xlsr
from speechdistill.models.windowed import WindowScorer, segment_starts

RATE = audio.SAMPLE_RATE


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return small_xlsr(tmp_path_factory.mktemp("encoder"))


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> str:
    return xlsr_head(tmp_path_factory.mktemp("head") / "head.pt")


@pytest.fixture(scope="module")
def teacher(encoder: str, head: str) -> WindowScorer:
    return xlsr.load(TeacherOptions(weights=encoder, device="cpu", head=head), layer=3)


def noise(duration_s: float, seed: int = 0) -> np.ndarray:
    return (0.1 * np.random.default_rng(seed).standard_normal(round(duration_s * RATE))).astype(np.float32)


def scores(teacher: WindowScorer, waves: list[np.ndarray]) -> list[float]:
    return [label.score for label in teacher.label(waves) if isinstance(label, Label)]


def original(encoder: str, head: str, wave: np.ndarray, hidden_state: int) -> float:
    """The score as the `xls-r-sqa` package computes it, by transformers' whole model and its own preparation."""
    from transformers import Wav2Vec2FeatureExtractor, Wav2Vec2Model

    model = Wav2Vec2Model.from_pretrained(encoder, local_files_only=True).eval()
    inputs = Wav2Vec2FeatureExtractor(do_normalize=True)(wave, sampling_rate=RATE, return_tensors="pt")
    top = QualityHead(model.config.hidden_size, 32, 4, 4).eval()
    top.load_state_dict(torch.load(head, weights_only=True))
    with torch.no_grad():
        frames = model(inputs["input_values"], output_hidden_states=True).hidden_states[hidden_state][0]
        start = max(0, int(len(frames) / 2 - 192))
        frames = frames[start : start + 384]
        frames = torch.nn.functional.pad(frames, (0, 0, 0, 384 - len(frames)))
        return float(1 + 4 * torch.sigmoid(top(frames[None])))


@pytest.mark.parametrize("duration_s", [0.1, 2.0, 7.68, 7.73, 11.3, 15.0])
def test_it_scores_as_the_whole_model_does(teacher: WindowScorer, encoder: str, head: str, duration_s: float) -> None:
    wave = noise(duration_s) * np.linspace(0.1, 1, round(duration_s * RATE), dtype=np.float32) + np.float32(0.01)
    assert scores(teacher, [wave]) == pytest.approx([original(encoder, head, wave, 3)], abs=1e-4)


def test_a_mixed_batch_scores_each_wave_as_if_alone(teacher: WindowScorer, encoder: str, head: str) -> None:
    waves = [noise(s, seed) * np.float32(1 + seed) for seed, s in enumerate((1.0, 9.0, 7.68, 0.1, 17.3, 14.9, 7.7))]
    batched = xlsr.load(TeacherOptions(weights=encoder, device="cpu", batch_s=4 * 7.68, head=head), layer=3)
    alone = [score for wave in waves for score in scores(teacher, [wave])]
    assert scores(batched, waves) == pytest.approx(alone, abs=1e-3)
    assert np.ptp(alone) > 0.01  # they differ by more than that


def test_long_audio_is_judged_in_windows(teacher: WindowScorer) -> None:
    wave = np.concatenate([noise(9), 0.3 * np.sin(np.arange(8 * RATE) / 5).astype(np.float32)])
    windows = [wave[start : start + 122_880] for start in segment_starts(len(wave))]
    assert scores(teacher, [wave]) == pytest.approx([np.mean(scores(teacher, windows))], abs=1e-5)
    assert len(teacher.timeline(wave)) == 17
    assert len(teacher.timeline(noise(2.5))) == 3


def test_bad_waves_are_reported_in_place(teacher: WindowScorer) -> None:
    results = teacher.label([noise(1), np.zeros(RATE, np.float32), noise(2)])
    assert [isinstance(result, Label) for result in results] == [True, False, True]
    assert teacher.label([]) == []


def test_bfloat16_is_near_and_is_used(teacher: WindowScorer, encoder: str, head: str) -> None:
    low = xlsr.load(TeacherOptions(weights=encoder, device="cpu", dtype="bfloat16", head=head), layer=3)
    waves = [noise(s, seed) for seed, s in enumerate((1.0, 3.0))]
    assert scores(low, waves) == pytest.approx(scores(teacher, waves), abs=0.1)
    assert scores(low, waves) != pytest.approx(scores(teacher, waves), abs=1e-7)


def test_attention_is_torchs_own(teacher: WindowScorer) -> None:
    assert teacher.forward.network.encoder.model.config._attn_implementation == "sdpa"


def test_every_format_of_a_checkpoint_gives_the_same(
    teacher: WindowScorer, encoder: str, head: str, tmp_path: Path
) -> None:
    from transformers import Wav2Vec2Model

    model = Wav2Vec2Model.from_pretrained(encoder, local_files_only=True)
    sharded = tmp_path / "sharded"
    model.save_pretrained(sharded, max_shard_size="20KB")
    assert len(list(sharded.glob("*.safetensors"))) > 1
    old = tmp_path / "old"  # as the hub has XLS-R: pretraining's names, weight norm before torch 2.0
    model.config.save_pretrained(old)
    state = load_file(Path(encoder, "model.safetensors"))
    places = {"parametrizations.weight.original0": "weight_g", "parametrizations.weight.original1": "weight_v"}
    renamed = {"project_q.weight": torch.ones(3)}
    for name, tensor in state.items():
        for new, before in places.items():
            name = name.replace(new, before)
        renamed[f"wav2vec2.{name}"] = tensor
    assert any(name.endswith("weight_g") for name in renamed)
    torch.save(renamed, old / "pytorch_model.bin")
    wave = noise(1)
    for folder in (sharded, old):
        other = xlsr.load(TeacherOptions(weights=str(folder), device="cpu", head=head), layer=3)
        assert scores(other, [wave]) == scores(teacher, [wave])
        assert other.weights_hash == teacher.weights_hash


def test_provenance_is_of_all_that_was_read(teacher: WindowScorer, encoder: str, head: str, tmp_path: Path) -> None:
    assert teacher.name == "xlsr"
    others = [
        xlsr.load(TeacherOptions(weights=encoder, device="cpu", head=head), layer=2),
        xlsr.load(TeacherOptions(weights=encoder, device="cpu", head=xlsr_head(tmp_path / "head.pt", seed=1)), layer=3),
        xlsr.load(TeacherOptions(weights=small_xlsr(tmp_path / "encoder", seed=1), device="cpu", head=head), layer=3),
    ]
    assert len({teacher.weights_hash, *(other.weights_hash for other in others)}) == 4


def test_the_2b_encoder_has_the_published_size_to_layer_10() -> None:
    from transformers import Wav2Vec2Config

    sizes = {"hidden_size": 1920, "num_hidden_layers": 48, "num_attention_heads": 16, "intermediate_size": 7680}
    norms = {"do_stable_layer_norm": True, "feat_extract_norm": "layer", "conv_bias": True}
    model = speech_encoder.build(Wav2Vec2Config(**sizes, **norms), xlsr.LAYER)
    parameters = list(model.parameters())
    assert all(parameter.is_meta for parameter in parameters)
    assert round(sum(parameter.numel() for parameter in parameters) / 1e6, 1) == 477.3
    head = QualityHead(1920, 32, 4, 4)
    assert sum(parameter.numel() for parameter in head.parameters()) == 105_602


PEAKS_OF_LOADING = """
import os, sys
from pathlib import Path
import torch, transformers
from transformers import Wav2Vec2Model
from speechdistill.models.teachers import xlsr
torch.set_num_threads(1)  # so that it can be forked
def peak():
    status = Path("/proc/self/status").read_text()
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")))
head, *folders = sys.argv[1:]
for folder in folders:
    for blocks in (0, 4):
        if child := os.fork():
            assert os.waitpid(child, 0)[1] == 0
            continue
        before = peak()
        if blocks:
            xlsr.load(TeacherOptions(weights=folder, device="cpu", head=head), layer=blocks)
        else:
            model = Wav2Vec2Model.from_pretrained(folder, local_files_only=True)
            assert all(parameter.isfinite().all() for parameter in model.parameters())  # reads what was only mapped
        print(peak() - before, flush=True)
        os._exit(0)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from Linux's /proc")
@pytest.mark.slow
def test_only_the_wanted_blocks_are_read(tmp_path: Path) -> None:
    folder = Path(small_xlsr(tmp_path / "wide", hidden_size=768, intermediate_size=3072, num_hidden_layers=12))
    head, pickled = xlsr_head(tmp_path / "head.pt", 768), tmp_path / "bin"
    shutil.copytree(folder, pickled, ignore=shutil.ignore_patterns("model.safetensors"))
    torch.save(load_file(folder / "model.safetensors"), pickled / "pytorch_model.bin")
    command = [sys.executable, "-c", PEAKS_OF_LOADING, head, str(folder), str(pickled)]
    printed = subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout.split()
    for whole, four in zip(printed[::2], printed[1::2], strict=True):
        assert int(four) <= 0.5 * int(whole), printed  # 0.37 by their numbers of weights, and 50 MB beside them


@pytest.mark.skipif(not Path(xlsr._released_head()).is_file(), reason="needs the wheel xls-r-sqa")
def test_the_head_is_the_original_one(monkeypatch: pytest.MonkeyPatch) -> None:
    model, config = (importlib.import_module(f"xls_r_sqa.{name}") for name in ("sqa_model", "config"))
    theirs = model.SingleLayerModel(config.XLSR_2B_TRANSFORMER_32DEEP_CONFIG).eval()
    theirs.load_state_dict(torch.load(xlsr._released_head(), weights_only=True))
    ours = xlsr._head(xlsr._released_head())[0]
    features = torch.randn(3, 384, 1920, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(torch.sigmoid(ours(features)), theirs(features), rtol=0, atol=1e-5)


def test_what_is_missing_says_where_it_is(encoder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere: no speech encoder there; .*xls-r-2b, .*8\.7 GB, Apache 2"):
        xlsr.load(TeacherOptions(weights=str(tmp_path / "nowhere"), device="cpu", head=xlsr_head(tmp_path / "head.pt")))
    with pytest.raises(FileNotFoundError, match=r"none-such is not in .*hub gives no answer; .*8\.7 GB"):
        xlsr.load(TeacherOptions(weights="hf://nobody/none-such", device="cpu", head=xlsr_head(tmp_path / "head.pt")))
    monkeypatch.setattr(xlsr, "XLSR_2B", "hf://nobody/none-such")  # the default is never downloaded
    with pytest.raises(FileNotFoundError, match=r"none-such is not in this machine's cache of the hub; give a folder"):
        xlsr.load(TeacherOptions(device="cpu", head=xlsr_head(tmp_path / "head.pt")))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match=r"pip install --no-deps xls-r-sqa==0\.1\.0"):
        xlsr.load(TeacherOptions(weights=encoder, device="cpu"))


def test_wrong_choices_are_refused(encoder: str, head: str, tmp_path: Path) -> None:
    wide = small_xlsr(tmp_path / "wide", hidden_size=32)
    torn = Path(small_xlsr(tmp_path / "torn"), "model.safetensors")
    torch.save({"norm_input.weight": torch.ones(16)}, tmp_path / "part.pt")
    torn.write_bytes(torn.read_bytes()[:-1000])
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"layer": 13}, "layer 13; the encoder has 4"),
        ({"weights": wide}, "takes features of 16, the encoder gives 32"),
        ({"weights": str(torn.parent)}, "not the weights of a speech encoder"),
        ({"head": str(tmp_path / "part.pt")}, "not a head of XLS-R"),
        ({"head": str(torn)}, "not a head of XLS-R"),
        ({"dtype": "float16"}, "choose from"),
        ({"hop_s": 8}, "up to 7.68"),
    ]
    for options, message in wrong:
        with pytest.raises(ValueError, match=message):
            layer = int(options.pop("layer", 3))
            xlsr.load(TeacherOptions(**{"weights": encoder, "device": "cpu", "head": head} | options), layer)


def test_load_and_the_commands_pass_the_head_on(tmp_path: Path) -> None:
    deep, head = small_xlsr(tmp_path / "deep", num_hidden_layers=11), xlsr_head(tmp_path / "head.pt")
    wave = audio.quantise(noise(1))
    soundfile.write(tmp_path / "a.wav", wave, RATE)
    model = Model(load_teacher("xlsr", TeacherOptions(weights=deep, device="cpu", head=head)))
    expected = pytest.approx(model(wave, RATE), abs=1e-5)
    weights = ["--weights", deep, "--head", head]
    assert cli.main(["score", f"{tmp_path}/a.wav", "--out", f"{tmp_path}/out.json", "--model", "xlsr", *weights]) == 0
    assert json.loads((tmp_path / "out.json").read_text())[0]["mos"] == expected
    teach = Teach("xlsr", deep, head, "float32", None, model.teacher.weights_hash)
    (row,) = teach([{"audio": audio.encode(wave, "flac"), "audio_format": "flac"}])
    assert isinstance(row, dict)
    assert (row["score"], row["teacher"], row["teacher_hash"]) == (expected, "xlsr", model.teacher.weights_hash)
    with pytest.raises(ValueError, match="teacher 'distillmos' takes no compile and no head"):
        load_teacher("distillmos", TeacherOptions(head=head, compile=True))


@pytest.mark.slow  # a minute of compiling
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile wants a C++ compiler")
def test_compiled_blocks_score_the_same(teacher: WindowScorer, encoder: str, head: str) -> None:
    compiled = xlsr.load(TeacherOptions(weights=encoder, device="cpu", batch_s=16, head=head, compile=True), layer=3)
    waves = [noise(s, seed) for seed, s in enumerate((1.0, 2.0, 2.0))]
    assert scores(compiled, waves) == pytest.approx(scores(teacher, waves), abs=1e-3)

"""SQUIM as a teacher, on random weights: the network is torchaudio's own where that is installed, else one like it.

torchaudio itself is never imported, and need not load: a wheel unpacked on PYTHONPATH will do.
"""

import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

from manifests import voice
from speechdistill.io import audio
from speechdistill.models.label import Label
from speechdistill.models.load import load_teacher
from speechdistill.models.options import TeacherOptions
from speechdistill.models.teachers import squim

RATE = audio.SAMPLE_RATE
STAND_IN = """
import torch

class Network(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.filters = torch.nn.Conv1d(1, 4, 64, 32)
        self.metrics = torch.nn.Linear(4, 3)

    def forward(self, waves):
        assert waves.ndim == 2
        waves = waves / (waves.square().mean(1, keepdim=True).sqrt() * 20)
        stoi, pesq, si_sdr = self.metrics(self.filters(waves[:, None]).relu().std(-1)).unbind(1)
        return [stoi.sigmoid(), 1 + 3.64 * pesq.sigmoid(), si_sdr]

squim_objective_base = Network
"""


@pytest.fixture(scope="module", params=["stand-in", "torchaudio"])
def weights(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A file of random weights, of the network that is installed while the fixture is."""
    folder = tmp_path_factory.mktemp("squim")
    patch = pytest.MonkeyPatch()
    if request.param == "torchaudio" and not find_spec("torchaudio"):
        pytest.skip("needs torchaudio, which need not load")
    if request.param == "stand-in":
        network = folder / "torchaudio" / "models" / "squim" / "objective.py"
        network.parent.mkdir(parents=True)
        network.write_text(STAND_IN)
        (folder / "torchaudio" / "__init__.py").write_text("raise OSError('built for another torch')")
        patch.syspath_prepend(folder)
    request.addfinalizer(patch.undo)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        torch.save(squim._network().state_dict(), folder / "weights.pth")
    return str(folder / "weights.pth")


def test_the_score_is_the_pesq_that_the_network_estimates(weights: str) -> None:
    network = squim._network().eval()
    network.load_state_dict(torch.load(weights, weights_only=True))
    teacher = squim.load(TeacherOptions(weights=weights, device="cpu"))
    for wave in (voice(0.1), voice(2.0, seed=1)):
        with torch.inference_mode():
            _, pesq, _ = network(torch.from_numpy(wave)[None])
        (label,) = teacher.label([wave])
        assert isinstance(label, Label) and label.disagreement is None
        assert label.score == pytest.approx(float(pesq), abs=1e-5)
        assert label.logit == pytest.approx(np.log((label.score - 1) / (5 - label.score)), abs=1e-6)
    assert (teacher.name, teacher.intrusive, len(teacher.weights_hash)) == ("squim", False, 64)
    assert sys.modules.get("torchaudio") is None


def test_a_mixed_batch_scores_each_wave_as_if_alone(weights: str) -> None:
    waves = [voice(s, seed=i) for i, s in enumerate((1.0, 0.5, 1.0, 0.3))]
    alone = [squim.load(TeacherOptions(weights=weights, device="cpu")).label([wave])[0] for wave in waves]
    together = squim.load(TeacherOptions(weights=weights, device="cpu", batch_s=4 * 7.68)).label(
        [*waves, np.zeros(RATE, np.float32)]
    )
    assert str(together.pop()).startswith("silent")
    for one, other in zip(alone, together, strict=True):
        assert isinstance(one, Label) and isinstance(other, Label) and other.score == pytest.approx(one.score, abs=1e-5)
    assert len({round(label.score, 4) for label in together if isinstance(label, Label)}) > 1


def test_a_long_wave_is_judged_by_the_windows_that_sound(weights: str) -> None:
    teacher = squim.load(TeacherOptions(weights=weights, device="cpu", hop_s=7.68))
    wave = np.concatenate([voice(7.68), np.zeros(2 * 122_880, np.float32)])
    (label,), (first,) = teacher.label([wave]), teacher.label([wave[:122_880]])
    assert isinstance(label, Label) and isinstance(first, Label)
    assert label.score == pytest.approx(first.score, abs=1e-5)
    assert len(teacher.timeline(wave)) == 24


def test_what_is_missing_or_wrong_is_told(weights: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="'squim' is float32"):
        load_teacher("squim", TeacherOptions(weights=weights, device="cpu", dtype="bfloat16"))
    (tmp_path / "torn.pth").write_bytes(Path(weights).read_bytes()[:1000])
    torch.save({"other": torch.zeros(1)}, tmp_path / "other.pth")
    for name in ("torn.pth", "other.pth"):
        with pytest.raises(ValueError, match=f"{name}: not SQUIM's weights"):
            squim.load(TeacherOptions(weights=str(tmp_path / name), device="cpu"))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"squim_objective_dns2020\.pth: no weights of SQUIM there; give https"):
        squim.load(TeacherOptions(device="cpu"))


def test_without_torchaudio_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"squim lacks torchaudio; install .*speechdistill\[torchaudio\]"):
        squim.load(TeacherOptions(device="cpu"))

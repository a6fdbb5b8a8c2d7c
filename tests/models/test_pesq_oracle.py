"""PESQ against the clean original as a teacher: the library's scores, and none where nothing can be compared."""

import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

import manifests
from configs import changed, config_of
from manifests import voice
from speechdistill import cli
from speechdistill.commands import doctor_trials, pseudolabel
from speechdistill.commands.doctor_trials import Places
from speechdistill.commands.pseudolabel import Pseudolabel
from speechdistill.io import audio, storage, table
from speechdistill.io.errors import RunError
from speechdistill.labelling.teach import Teach
from speechdistill.models.label import Label, Teacher, Unscorable
from speechdistill.models.load import load_teacher
from speechdistill.models.model import Model
from speechdistill.models.options import TeacherOptions

pesq = pytest.importorskip("pesq", reason="its installation needs a C compiler")

RATE = audio.SAMPLE_RATE
CLEAN = voice(3.0)
NOISY = CLEAN + np.random.default_rng(0).standard_normal(len(CLEAN)).astype(np.float32) / 1000


@pytest.fixture(scope="module")
def teacher() -> Teacher:
    return load_teacher("pesq_oracle")


def test_scores_are_those_of_the_library(teacher: Teacher) -> None:
    same, noisy = teacher.label([CLEAN, NOISY], [CLEAN, CLEAN])
    assert isinstance(same, Label) and isinstance(noisy, Label)
    assert same.score == pytest.approx(4.6439, abs=1e-3)
    assert noisy.score == pytest.approx(pesq.pesq(RATE, CLEAN, NOISY, "wb"), abs=1e-6)
    assert 1 < noisy.score < same.score - 0.5
    assert noisy.logit == pytest.approx(np.log((noisy.score - 1) / (5 - noisy.score)), abs=1e-6)
    assert Model(load_teacher("pesq_oracle"))(NOISY, RATE, reference=CLEAN) == noisy.score
    assert (teacher.intrusive, len(teacher.weights_hash)) == (True, 64)


def test_what_pesq_cannot_judge_says_why(teacher: Teacher) -> None:
    silent = np.zeros(RATE, np.float32)
    pairs = {
        "silent": (silent, CLEAN[:RATE]),
        "clean original: silent": (CLEAN[:RATE], silent),
        "0.200 s; PESQ takes 0.25 to 20 s": (NOISY[:3200], CLEAN[:3200]),
        "20.062 s; PESQ takes": (voice(20.0625), voice(20.0625)),
        "no utterance": (voice(0.26), voice(0.26)),
    }
    results = teacher.label([*(wave for wave, _ in pairs.values()), NOISY], [*(r for _, r in pairs.values()), CLEAN])
    assert isinstance(results.pop(), Label)
    for reason, result in zip(pairs, results, strict=True):
        assert isinstance(result, Unscorable) and reason in str(result)


def test_as_many_utterances_as_the_longest_wave_can_hold_are_judged(teacher: Teacher) -> None:
    t = np.arange(20 * RATE) / RATE  # of 25 s of them the library crashes
    bursts = (0.1 * np.random.default_rng(0).standard_normal(len(t)) * (t % 0.42 < 0.21)).astype(np.float32)
    (label,) = teacher.label([bursts], [bursts])
    assert isinstance(label, Label) and label.score > 4


def test_the_labelling_job_drops_the_reference_unless_it_is_kept(teacher: Teacher) -> None:
    row = {"audio_format": "flac"}
    for column, wave in (("audio", NOISY), ("reference", CLEAN)):
        row[column] = audio.encode(audio.quantise(wave), "flac")
    for keep in (True, False):
        work = Teach("pesq_oracle", None, None, "float32", None, teacher.weights_hash, keep)
        (result,) = work([row])
        assert isinstance(result, dict) and 1 < result["score"] < 4
        assert ({**row, **result}["reference"] is None) != keep


def test_a_recipe_whose_samples_have_no_clean_original_is_refused_before_work(tmp_path: Path) -> None:
    pytest.importorskip("espeakng_loader", reason='pip install "speechdistill[demo]"')
    storage.publish(table.parquet_bytes(manifests.manifest()), f"{tmp_path}/clips.parquet")
    (tmp_path / "texts").mkdir()
    for language in ("en", "de", "fr", "es", "pt"):
        (tmp_path / "texts" / f"{language}.txt").write_text("One sentence.\n")
    config = config_of(
        Pseudolabel, clips=f"{tmp_path}/clips.parquet", out=f"{tmp_path}/out", recipe="as_is", teacher="pesq_oracle"
    )
    for teacher in ("pesq_oracle", "ensemble:distillmos=1,pesq_oracle=1"):
        with pytest.raises(RunError, match="compares with clean speech; recipe as_is degrades nothing"):
            pseudolabel.run(changed(config, teacher=teacher))
    spoken = changed(config, recipe="weights_free", assets={"texts": f"{tmp_path}/texts"})
    with pytest.raises(RunError, match=r"generated samples have none; give --without generated\.espeak"):
        pseudolabel.run(spoken)
    assert not (tmp_path / "out").exists()


def test_recordings_alone_cannot_be_scored(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    soundfile.write(tmp_path / "a.wav", NOISY, RATE)
    for model in ("pesq_oracle", "ensemble:distillmos=1,pesq_oracle=1"):
        assert cli.main(["score", f"{tmp_path}/a.wav", "--model", model]) == 1
        captured = capsys.readouterr()
        assert "compares with clean speech, which only the labelling job has" in captured.err and not captured.out
    with pytest.raises(ValueError, match="give each wave's reference"):
        Model(load_teacher("pesq_oracle"))(NOISY, RATE)


def test_the_doctor_tries_it_and_what_is_missing_or_wrong_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    assert doctor_trials.TRIALS["teacher"]("pesq_oracle", Places()).endswith("4.64 MOS")
    with pytest.raises(ValueError, match="'pesq_oracle' has no weights"):
        load_teacher("pesq_oracle", TeacherOptions(weights="file.pt"))
    monkeypatch.setitem(sys.modules, "pesq", None)
    with pytest.raises(ImportError, match="pip install pesq"):
        load_teacher("pesq_oracle")

"""The synthetic corpus: what the demo needs, made the same every time."""

import csv
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

from speechdistill.data.corpora import espeak
from speechdistill.io import audio, table

pytest.importorskip("espeakng_loader", reason='espeak-ng is not installed: pip install "speechdistill[demo]"')
NUM_CLIPS = 15  # three speakers per language; one of them breathes noise


def contents(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("corpus")
    assert espeak.write(root, NUM_CLIPS) == root / "corpus.csv"
    return root


def test_rows_fit_the_manifest_and_the_files(corpus: Path) -> None:
    rows = list(espeak.rows(corpus, NUM_CLIPS))
    assert [row["kind"] for row in rows] == ["speech"] * NUM_CLIPS + ["noise"] * 6 + ["rir"] * 6
    header = {"clip_id": "0", "duration_s": 1.0, "sample_rate": 16_000, "channels": 1}
    table.from_rows([{**row, **header} for row in rows], "clip.v1")
    assert all(row["licence"] and row["corpus"] == "espeak" for row in rows)
    assert len({Path(row["uri"]).read_bytes() for row in rows}) == len(rows)
    speech = rows[:NUM_CLIPS]
    assert {row["language"] for row in speech} == {"en-US", "de-DE", "fr-FR", "es-ES", "pt-PT"}
    assert len({row["speaker"] for row in speech}) == NUM_CLIPS
    for row in speech:
        info = audio.probe(row["uri"])
        assert (info.sample_rate, info.channels) == (22_050, 1)
        assert 4 <= info.duration_s <= 10.5
        wave = audio.load(row["uri"])
        assert 0.02 < np.sqrt(np.mean(wave**2)) < 0.3
        assert np.abs(wave).max() <= 1


def test_the_list_has_relative_paths(corpus: Path) -> None:
    with (corpus / "corpus.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["path", "kind", "corpus", "speaker", "language", "licence"]
    assert len(rows) == NUM_CLIPS + 12
    assert {row["path"] for row in rows} | {"corpus.csv"} == set(contents(corpus))
    assert rows[-1]["speaker"] == ""


def test_another_corpus_has_the_same_bytes(corpus: Path, tmp_path: Path) -> None:
    espeak.write(tmp_path / "a b" / "é", NUM_CLIPS)
    assert contents(tmp_path / "a b" / "é") == contents(corpus)


def test_order_does_not_matter(corpus: Path, tmp_path: Path) -> None:
    """espeak-ng keeps state: a clip made third must equal the same clip made first."""
    utterances = {index: espeak._utterance(index) for index in (7, 2, 9, 0)}
    espeak._speak({tmp_path / "speech" / espeak._name(index, one): one for index, one in utterances.items()})
    made = contents(tmp_path)
    assert len(made) == 4
    assert made.items() <= contents(corpus).items()


def test_what_exists_is_kept_and_what_is_missing_is_made(corpus: Path, tmp_path: Path) -> None:
    espeak.write(tmp_path, 4)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.wav")}
    gone = sorted(before)[::5]
    for path in gone:
        path.unlink()
    rows = list(espeak.rows(tmp_path, 6))
    assert all(Path(row["uri"]).is_file() for row in rows)
    assert all(path.stat().st_mtime_ns == time for path, time in before.items() if path not in gone)
    espeak.write(tmp_path, NUM_CLIPS)
    assert contents(tmp_path) == contents(corpus)


def test_noises_are_loud_everywhere_and_unlike_each_other(corpus: Path) -> None:
    spectra = {}
    for path in sorted((corpus / "noise").iterdir()):
        wave = audio.load(str(path)).astype(np.float64)
        assert len(wave) == 10 * audio.SAMPLE_RATE
        assert 0.01 < np.sqrt(np.mean(wave**2)) < 0.06
        assert np.sqrt(np.mean(wave.reshape(10, -1) ** 2, axis=1)).min() > 1e-3
        power = np.abs(np.fft.rfft(wave.reshape(100, -1), axis=1)) ** 2
        spectra[path.stem] = np.log10(power.mean(0) + 1e-9)
    assert set(spectra) == {"babble", "brown", "hum", "pink", "rain", "typing"}
    names = sorted(spectra)
    for i, one in enumerate(names):
        for other in names[i + 1 :]:
            assert np.abs(spectra[one] - spectra[other]).mean() > 0.1, (one, other)
    octave = slice(100, 200), slice(200, 400)  # 1..2 and 2..4 kHz: pink falls 3 dB per octave, brown 6
    for name, fall_db in (("pink", 3), ("brown", 6)):
        low, high = (10 * spectra[name][part].mean() for part in octave)
        assert abs(low - high - fall_db) < 0.7


def test_rooms_have_their_reverberation_time(corpus: Path) -> None:
    for name, (*_, rt60_s) in espeak._ROOMS.items():
        response, rate = soundfile.read(corpus / "rir" / f"{name}.wav")
        assert rate == audio.SAMPLE_RATE
        assert 0.89 < np.abs(response).max() < 0.91
        energy = np.cumsum(response[::-1] ** 2)[::-1]  # Schroeder's backward integration, ISO 3382
        level_db = 10 * np.log10(energy / energy[0] + 1e-12)
        t20 = np.argmax(level_db < -25) - np.argmax(level_db < -5)
        assert 3 * t20 / rate == pytest.approx(rt60_s, rel=0.25), name


def test_failures_name_their_cause(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "espeakng_loader", None)
        with pytest.raises(ImportError, match=r"pip install \"speechdistill\[demo\]\""):
            list(espeak.rows(tmp_path, 1))
    monkeypatch.setattr(espeak, "_VOICES", {"en-US": "klingonese"})
    with pytest.raises(RuntimeError, match="no voice klingonese"):
        espeak.write(tmp_path, 1)
    assert contents(tmp_path) == {}

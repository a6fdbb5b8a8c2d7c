"""From listening tests to a trained teacher, its labels, and a student of it, by the commands and a real Ray."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import soundfile

from manifests import voice
from small_models import speech_encoder
from speechdistill import cli
from speechdistill.data import scored_clips
from speechdistill.data.label_scale import LabelTransform
from speechdistill.engine.isolate import CannotWork
from speechdistill.io import audio, storage, table
from speechdistill.io.errors import AudioError, TableError, UnreadableError
from speechdistill.labelling import features
from speechdistill.labelling.features import Encode, Load
from speechdistill.models.networks.speech_encoder import load as load_encoder
from speechdistill.models.options import WHOLE_S

RATE = audio.SAMPLE_RATE


def corpora(folder: Path, clips: int = 36) -> str:
    """Three listening tests of noisy voices: the more noise the lower the score, on a scale of each test's own."""
    folder.mkdir()
    rows = []
    for i in range(clips):
        level = (i // 3) / clips
        wave = voice(1.0 + i % 3 / 2, seed=i)
        wave += level * np.random.default_rng(i).standard_normal(len(wave)).astype(np.float32)
        path = folder / f"{i}.wav"
        soundfile.write(path, 0.3 * wave, RATE)
        split = "validation" if i % 4 == 3 else "train"
        rows.append([path, 4.5 - 3 * level - i % 3 / 2, "abc"[i % 3], split])
    with (folder / "scores.csv").open("w") as file:
        csv.writer(file).writerows([["path", "mos", "dataset", "split"], *rows])
    return f"{folder}/scores.csv"


@pytest.mark.slow  # several jobs one after another
def test_from_listening_tests_to_a_student(
    tmp_path: Path, local_ray: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.chdir(tmp_path)
    scores, out = corpora(tmp_path / "corpora"), f"{tmp_path}/teacher"
    encoder = speech_encoder(tmp_path / "encoder", "wav2vec2", large=True)
    command = ["train-teacher", "--labeled", scores, "--encoder", encoder, "--layer", "3", "--out", out]
    command += ["--steps", "20", "--validate-every", "10", "--learning-rate", "1e-3", "--cpus-per-worker", "0.5"]
    assert cli.main(command) == 0
    printed = capsys.readouterr().out
    assert f"best of teacher: {out}/teacher/best" in printed
    run = printed.split("done")[1].split()[0]
    transform = LabelTransform.read(f"{out}/teacher/best/label_transform.v1.json")
    assert set(transform.datasets) == set("abc")

    promote = ["promote", "--run", run, "--model-name", "teacher", "--eval", scores]
    assert cli.main(promote) == 0
    assert json.loads(capsys.readouterr().out)["decision"] == "promoted"

    clips, labels = f"{tmp_path}/clips/clips.parquet", f"{tmp_path}/labels"
    assert cli.main(["ingest", "--speech", f"{tmp_path}/corpora", "--out", f"{tmp_path}/clips"]) == 0
    label = ["pseudolabel", "--clips", clips, "--teacher", "models:/teacher@champion", "--out", labels]
    assert cli.main([*label, "--rows-per-part", "18", "--segment-s", "0.5"]) == 0
    rows = table.read(f"{labels}/{table.read(f'{labels}/manifest.parquet', 'shard.v1')['path'][0]}", "pseudolabel.v1")
    assert set(rows["teacher"].to_pylist()) == {"quality_head"}
    capsys.readouterr()

    student = ["train-students", "--shards", labels, "--labeled", scores, "--variants", "tiny", "--steps", "5"]
    student += ["--label-transform", f"{out}/teacher/best/label_transform.v1.json", "--crop-s", "0.08"]
    assert cli.main([*student, "--cpus-per-worker", "0.5", "--out", f"{tmp_path}/students"]) == 0
    about = json.loads(Path(f"{tmp_path}/students/tiny/best/student.json").read_text())
    assert about["provenance"]["label_transform"]["datasets"]["a"]["a"] == transform.datasets["a"].a

    assert cli.main(command) == 0  # all of it is there
    assert run in capsys.readouterr().out
    assert cli.main([*command, "--plain"]) == 1
    assert "bias_aware: true -> false" in capsys.readouterr().out
    before = list(Path(f"{out}/features/shards").iterdir())
    shared = [*command, "--plain", "--features", f"{out}/features", "--out", f"{tmp_path}/plain"]
    assert cli.main(shared) == 0
    assert list(Path(f"{out}/features/shards").iterdir()) == before and not Path(f"{tmp_path}/plain/features").exists()


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("clips")
    rows = scored_clips.manifest(corpora(folder / "corpora", 12))
    storage.publish(table.parquet_bytes(features.scored_clips(rows)), f"{folder}/clips.parquet")
    return f"{folder}/clips.parquet"


def test_features_are_the_encoders_and_do_not_depend_on_company(clips: str, tmp_path: Path) -> None:
    place = speech_encoder(tmp_path, "wav2vec2", large=True)
    found, digest = load_encoder(place, 3)
    rows = [{"id": i, **row} for i, row in enumerate(Load(clips)([{"id": i} for i in range(6)]))]
    together = Encode(place, 3, "float32", digest, batch_s=60.0)(rows)
    alone = Encode(place, 3, "float32", digest, batch_s=0.1)(rows)
    clip = table.read(clips, "clip.v1").slice(2, 1).to_pylist()[0]
    wave = audio.load(clip["uri"])
    frames, _ = found(*found.prepared([wave]))
    for one, other in zip(together, alone, strict=True):
        assert isinstance(one, dict) and isinstance(other, dict)
        assert one["num_frames"] == other["num_frames"]
        np.testing.assert_allclose(hidden(one), hidden(other), atol=2e-2)  # float16 above 8 has steps of 0.008
    expected = frames[0].numpy()
    assert isinstance(together[2], dict)
    np.testing.assert_allclose(hidden(together[2]), expected, atol=2e-2)
    with pytest.raises(ValueError, match="has other weights on this node"):
        Encode(place, 3, "float32", "0", 8.0)


def test_of_many_frames_the_middle_ones_are_kept_and_what_float16_cannot_hold_is_rejected(tmp_path: Path) -> None:
    place = speech_encoder(tmp_path, "wav2vec2", large=True)
    found, digest = load_encoder(place, 3)
    wave = voice(10.0, seed=3)
    encode = Encode(place, 3, "float32", digest, batch_s=60.0)
    (row,) = encode([{"wave": wave.tobytes()}])
    frames = found(*found.prepared([wave]))[0][0]
    first = (len(frames) - 384) // 2
    assert isinstance(row, dict) and row["num_frames"] == 384
    np.testing.assert_allclose(hidden(row), frames[first : first + 384].numpy(), atol=2e-2)
    encode._encoder.model.encoder.layers[2].feed_forward.output_dense.bias.fill_(1e5)
    (row,) = encode([{"wave": wave.tobytes()}])
    assert isinstance(row, ArithmeticError)


def test_a_storage_that_is_away_ends_the_job(clips: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def away(uri: str, *_: object) -> None:
        raise UnreadableError(uri, "the storage does not answer", "try again")

    monkeypatch.setattr(audio, "load", away)
    monkeypatch.setattr(audio, "probe", away)
    with pytest.raises(CannotWork, match="other files of that storage cannot be read either"):
        Load(clips)([{"id": 0}])


def hidden(row: dict[str, object]) -> np.ndarray:
    return np.frombuffer(row["hidden"], "<f2").reshape(row["num_frames"], row["dim"]).astype(np.float32)  # type: ignore[call-overload]


def test_of_a_long_clip_the_middle_is_heard_and_a_bad_one_is_rejected(tmp_path: Path) -> None:
    long = voice(WHOLE_S + 4, seed=1)
    soundfile.write(tmp_path / "long.wav", long, RATE, subtype="FLOAT")
    soundfile.write(tmp_path / "silent.wav", np.zeros(RATE), RATE)
    with (tmp_path / "scores.csv").open("w") as file:
        csv.writer(file).writerows([["path", "mos"], [tmp_path / "long.wav", 3], [tmp_path / "silent.wav", 1]])
    rows = scored_clips.manifest(f"{tmp_path}/scores.csv")
    storage.publish(table.parquet_bytes(rows), f"{tmp_path}/clips.parquet")
    (tmp_path / "silent.wav").write_bytes(b"no audio")
    read = Load(f"{tmp_path}/clips.parquet")([{"id": 0}, {"id": 1}])
    heard = next(row for row in read if isinstance(row, dict))
    np.testing.assert_allclose(np.frombuffer(heard["wave"], np.float32), long[2 * RATE : -2 * RATE], atol=1e-6)
    assert any(isinstance(row, AudioError) for row in read)


def test_splits_and_datasets_are_filled_in(tmp_path: Path) -> None:
    rows = scored_clips.manifest(corpora(tmp_path / "corpora", 12))
    without = rows.set_column(rows.schema.get_field_index("split"), "split", [[None] * len(rows)])
    filled = features.scored_clips(table.validate(without, "clip.v1"))
    assert set(filled["split"].to_pylist()) == {"train", "validation"} and len(filled) == 12
    assert set(filled["dataset"].to_pylist()) == set("abc")
    named = rows.set_column(rows.schema.get_field_index("split"), "split", [["fold1"] * 3 + ["train"] * 9])
    with pytest.raises(TableError, match="split 'fold1' is unknown; choose from train, validation, test"):
        features.scored_clips(table.validate(named, "clip.v1"))
    train_only = rows.set_column(rows.schema.get_field_index("split"), "split", [["train"] * 12])
    with pytest.raises(TableError, match=r"none is of split validation \(there are: \['train'\]\)"):
        features.scored_clips(table.validate(train_only, "clip.v1"))
    test_only = rows.set_column(
        rows.schema.get_field_index("split"), "split", [["test"] * 3 + ["train"] * 6 + ["validation"] * 3]
    )
    assert len(features.scored_clips(table.validate(test_only, "clip.v1"))) == 9

"""A tracking database that MLflow cannot use is one line before the work; one that was moved goes on."""

import shutil
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from speechdistill import cli
from speechdistill.commands import doctor_trials
from speechdistill.commands.doctor_trials import Places
from speechdistill.tracking import database
from speechdistill.tracking.mlflow_sender import TrackingError

OLDER = "75868b020152"
TABLES = """
CREATE TABLE alembic_version (version_num TEXT);
CREATE TABLE experiments (artifact_location TEXT);
CREATE TABLE runs (artifact_uri TEXT);
CREATE TABLE logged_models (artifact_location TEXT);
CREATE TABLE model_versions (source TEXT, storage_location TEXT);
"""


def made(folder: Path, version: str | None = None) -> Path:
    """A database as MLflow leaves it, with an experiment, a run and a version whose files are in `folder`."""
    newest = database.revisions()[1]
    assert newest
    files = (folder / "mlartifacts").as_uri()
    (folder / "mlartifacts").mkdir(parents=True)
    with closing(sqlite3.connect(folder / "mlflow.db")) as connection:
        connection.executescript(TABLES)
        connection.execute("INSERT INTO alembic_version VALUES (?)", (version or newest,))
        connection.executemany("INSERT INTO experiments VALUES (?)", [(files,), ("file:///x/mlruns",), ("s3://b/c",)])
        connection.execute("INSERT INTO runs VALUES (?)", (f"{files}/7/artifacts",))
        connection.execute("INSERT INTO logged_models VALUES (?)", (f"{files}-of-others/7",))
        connection.execute("INSERT INTO model_versions VALUES (?, ?)", (f"{files}/m/artifacts", f"{files}/m/artifacts"))
        connection.commit()
    return folder / "mlflow.db"


def refused(file: Path, **options: Any) -> str:
    with pytest.raises(TrackingError) as error:
        database.check(f"sqlite:///{file}", **options)
    assert str(file) in str(error.value)
    return str(error.value)


def test_a_database_of_another_version_is_told_with_the_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database, "_MIGRATION_S", 0.0)
    assert f"`mlflow db upgrade sqlite:///{tmp_path}/a/mlflow.db`" in refused(made(tmp_path / "a", OLDER))
    assert "a newer one" in refused(made(tmp_path / "b", "ffffffffffff"))
    database.check(f"sqlite:///{made(tmp_path / 'c')}")
    sqlite3.connect(tmp_path / "empty.db").close()
    database.check(f"sqlite:///{tmp_path}/empty.db")
    for elsewhere in ("http://127.0.0.1:9", f"sqlite:///{tmp_path}/new.db", "sqlite://"):
        database.check(elsewhere)
    assert not (tmp_path / "new.db").exists()


def test_one_that_cannot_be_read_or_written_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(database, "_WAIT_S", 0.1)
    file = made(tmp_path / "a")
    with closing(sqlite3.connect(file, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        assert "database is locked" in refused(file) and "fuser" in refused(file)
        database.check(f"sqlite:///{file}", writes=False)
        other.execute("COMMIT")
        other.execute("BEGIN EXCLUSIVE")
        assert "database is locked" in refused(file, writes=False)
    (tmp_path / "text.db").write_text("no database at all, but rather long" * 100)
    assert "file is not a database" in refused(tmp_path / "text.db")
    torn = tmp_path / "torn.db"
    torn.write_bytes(file.read_bytes()[:5000])
    assert "restore it from a copy" in refused(torn)
    (tmp_path / "folder.db").mkdir()
    assert "unable to open" in refused(tmp_path / "folder.db")


def test_a_folder_of_runs_that_moved_keeps_its_files(tmp_path: Path) -> None:
    file = made(tmp_path / "it's 100%_here")
    moved = tmp_path / "moved"
    file.parent.rename(moved)
    database.check(f"sqlite:///{moved}/mlflow.db", writes=False)
    here = (moved / "mlartifacts").as_uri()

    def stored(where: Path) -> list[list[Any]]:
        with closing(sqlite3.connect(where / "mlflow.db")) as connection:
            names = ("experiments", "runs", "logged_models", "model_versions")
            return [connection.execute(f"SELECT * FROM {name}").fetchall() for name in names]

    version = f"{here}/m/artifacts"
    experiments, runs, models, versions = stored(moved)
    assert experiments == [(here,), ("file:///x/mlruns",), ("s3://b/c",)]
    assert (runs, versions) == ([(f"{here}/7/artifacts",)], [(version, version)])
    assert models[0][0].endswith("here/mlartifacts-of-others/7".replace("here", "it%27s%20100%25_here"))
    # Of a copy, each has its own files; a database alone leaves its files where they are.
    shutil.copytree(moved, tmp_path / "copy")
    database.check(f"sqlite:///{tmp_path}/copy/mlflow.db")
    assert stored(tmp_path / "copy")[0][0] == ((tmp_path / "copy" / "mlartifacts").as_uri(),)
    (tmp_path / "alone").mkdir()
    shutil.copy(moved / "mlflow.db", tmp_path / "alone")
    database.check(f"sqlite:///{tmp_path}/alone/mlflow.db")
    assert stored(tmp_path / "alone")[0][0] == (here,)


@pytest.mark.parametrize("command", ["pseudolabel", "compare", "sync", "promote", "train-students"])
def test_every_command_that_tracks_refuses_it(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(database, "_MIGRATION_S", 0.0)
    file, out = made(tmp_path / "runs", OLDER), str(tmp_path / "runs")
    options = {
        "pseudolabel": ["--clips", clips(tmp_path), "--recipe", "as_is", "--teacher", "dnsmos_p808"],
        "compare": ["--clips", "x.csv", "--models", "distillmos"],
        "train-students": ["--shards", "x"],
    }.get(command, [])
    where = {"sync": [out], "promote": ["--run", "7", "--eval", "x.csv", "--tracking", out]}
    assert cli.main([command, *options, *where.get(command, ["--out", out])]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: the tracking database {file} has an out-of-date database schema ({OLDER}; ")


def test_the_doctor_tells_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(database, "_MIGRATION_S", 0.0)
    file = made(tmp_path, OLDER)
    for variable, places in ((f"sqlite:///{file}", Places()), ("", Places(out=str(tmp_path)))):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", variable)
        with pytest.raises(TrackingError, match="out-of-date database schema"):
            doctor_trials.TRIALS["tracking"]("", places)


def clips(folder: Path) -> str:
    from manifests import manifest
    from speechdistill.io import storage, table

    storage.publish(table.parquet_bytes(manifest()), f"{folder}/clips.parquet")
    return f"{folder}/clips.parquet"

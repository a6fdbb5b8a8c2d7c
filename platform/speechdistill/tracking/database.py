# tracking/: MLflow: the event log beside a run, the thread that sends it, registered models and their stored code.
"""Check the sqlite database of runs before the work, and update the paths in a database that was moved."""

import re
import sqlite3
import time
from contextlib import closing
from importlib.util import find_spec
from pathlib import Path
from urllib.request import url2pathname

from speechdistill.tracking.mlflow_sender import TrackingError, artifact_folder

_SQLITE = "sqlite:///"
_WAIT_S = 10.0  # for a lock of another job that is writing
_MIGRATION_S = 2.0  # a database that another job is creating passes through versions
_AGAIN = "or move it away: `speechdistill sync OUT` sends a run to a new database"
_FIXES = (  # a part of the message, the fix
    ("locked", "end the program that holds it (`fuser -v` with its path names it), then rerun the command"),
    ("readonly", "give this user the right to write to it and to its folder, or set MLFLOW_TRACKING_URI to another"),
    ("ermission denied", "give this user the right to read its folder, or set MLFLOW_TRACKING_URI to another"),
    ("unable to open", "check its path, its permissions and the free space, or set MLFLOW_TRACKING_URI to another"),
    ("", f"restore it from a copy, {_AGAIN}"),
)
_ADDRESSES = (
    ("experiments", "artifact_location"),
    ("runs", "artifact_uri"),
    ("logged_models", "artifact_location"),
    ("model_versions", "source"),
    ("model_versions", "storage_location"),
)
"""Columns in which MLflow stores absolute addresses of files."""


def file_of(uri: str) -> Path | None:
    """Return the file of a sqlite database; None for any other MLflow."""
    return Path(uri.removeprefix(_SQLITE).partition("?")[0]) if uri.startswith(_SQLITE) else None


def check(uri: str, writes: bool = True) -> None:
    """Raise `TrackingError` if MLflow cannot use a sqlite database: another version, locked, or unreadable.

    In a database that was moved or copied with its folder, the addresses of files are set to the new folder.
    """
    file = file_of(uri)
    try:
        if file is None or not file.exists():
            return
        with closing(sqlite3.connect(file, timeout=_WAIT_S, isolation_level=None)) as database:
            _check_version(uri, database)
            if writes:
                database.execute("BEGIN IMMEDIATE")
                database.rollback()
            _follow(database, artifact_folder(file))
    except (sqlite3.Error, OSError) as error:
        fix = next(fix for part, fix in _FIXES if part in str(error))
        raise TrackingError(f"the tracking database {file} cannot be used ({error})", fix) from error


def _check_version(uri: str, database: sqlite3.Connection) -> None:
    known, newest = revisions()
    revision, before = _version(database), None
    while revision not in (None, newest, before):
        time.sleep(_MIGRATION_S)
        revision, before = _version(database), revision
    if revision in (None, newest) or newest is None:
        return
    file = file_of(uri)
    if revision in known:
        reason = (
            f"the tracking database {file} has an out-of-date database schema ({revision}; this MLflow's is {newest})"
        )
        raise TrackingError(reason, f"run `mlflow db upgrade {uri}` on a copy of it, then on itself")
    reason = f"the tracking database {file} has the schema of another MLflow ({revision}; this one's is {newest})"
    raise TrackingError(reason, "use the version of MLflow that wrote it, or a newer one")


def _version(database: sqlite3.Connection) -> str | None:
    """Return the schema's revision; None if MLflow has not created its tables yet."""
    if not database.execute("SELECT 1 FROM sqlite_master WHERE name = 'alembic_version'").fetchone():
        return None
    row = database.execute("SELECT version_num FROM alembic_version").fetchone()
    return str(row[0]) if row else None


def revisions() -> tuple[set[str], str | None]:
    """Return the schemas that the installed MLflow knows, and the newest one.

    Read from the migrations' files, since importing MLflow takes seconds. The newest is None if they do not give one:
    MLflow then decides.
    """
    package = find_spec("mlflow")
    if package is None or package.origin is None:
        return set(), None
    files = Path(package.origin).parent.glob("store/db_migrations/versions/*.py")
    text = "\n".join(file.read_text() for file in files)
    known, earlier = (set(re.findall(rf"^{name} = [\"'](\w+)", text, re.M)) for name in ("revision", "down_revision"))
    last = known - earlier
    return known, last.pop() if len(last) == 1 else None


def _follow(database: sqlite3.Connection, folder: str) -> None:
    """Set addresses of files that point to the database's earlier place to `folder`, beside the database."""
    if not database.execute("SELECT 1 FROM sqlite_master WHERE name = 'logged_models'").fetchone():
        return
    for (before,) in database.execute("SELECT DISTINCT artifact_location FROM experiments").fetchall():
        if not _was_moved(str(before), folder):
            continue
        database.execute("BEGIN IMMEDIATE")
        for table, column in _ADDRESSES:
            moved = f"UPDATE {table} SET {column} = ? || substr({column}, ?) WHERE {column} || '/' LIKE ? ESCAPE '!'"
            pattern = re.sub("([!%_])", r"!\1", before) + "/%"
            database.execute(moved, (folder, len(before) + 1, pattern))
        database.execute("COMMIT")


def _was_moved(before: str, folder: str) -> bool:
    """Whether a folder of files has moved to `folder`. If only the database was moved, they stay in place."""
    if before == folder or not before.startswith("file://") or Path(before).name != Path(folder).name:
        return False
    old, new = (Path(url2pathname(place.removeprefix("file://"))) for place in (before, folder))
    return new.is_dir() or not old.is_dir()

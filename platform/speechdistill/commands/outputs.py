"""Checks of a job's output folder and of the place of its tracking, before any work."""

from contextlib import suppress
from typing import Any

from speechdistill.io import outputs, storage
from speechdistill.io.errors import RunError
from speechdistill.tracking.event_log import run_event, segments
from speechdistill.tracking.run import checked_uri

_SPACE_BYTES = 1 << 24  # a first part: 64 samples of 7.68 s
_SQLITE = "sqlite:///"


def try_job(out: str, command: str, *names: str) -> None:
    """Try to write the files `names` in the folder `out` (or elsewhere, by full paths and URLs) and the tracking's.

    Raises `UserError` for files that cannot be written, if `out` is the folder of another command, or if the place of
    the tracking cannot be decided.
    """
    out = storage.absolute(out)
    check_own(out, command)
    uri = checked_uri(out)
    database = [uri.removeprefix(_SQLITE).partition("?")[0]] if uri.startswith(_SQLITE) else []
    files = [name if "://" in name or name.startswith("/") else f"{out}/{name}" for name in (*names, "tracking/events")]
    outputs.try_outputs(*files, *filter(None, database), space_bytes=_SPACE_BYTES)


def check_own(out: str, command: str) -> None:
    """Raise `RunError` if other commands have written into the folder `out`, and `command` has not.

    Two commands in one folder would replace each other's files (`clips.parquet`, `summary.json`) and resume each
    other's MLflow run. Two commands that share a folder of an earlier version may both use it.
    """
    out = storage.absolute(out)
    if out.endswith("/shards") and _has(f"{out.removesuffix('/shards')}/run.json"):
        raise RunError(f"{out} holds the parts of a run", f"give {command} an --out of its own")
    owners = _owners(out)
    if owners and command not in owners:
        others = " and ".join(f"`speechdistill {owner}`" for owner in sorted(owners))
        raise RunError(f"{out} holds the output of {others}", f"give {command} an --out of its own")


def _owners(out: str) -> set[str]:
    """Return the commands whose output is in a folder, by its manifest, configuration and tracking log."""
    owners: dict[Any, None] = {"ingest": None} if _has(f"{out}/parts") or _has(f"{out}/ingest.json") else {}
    with suppress(ValueError, KeyError, TypeError, AttributeError):  # edited by hand: the reader of the file reports it
        owners[(storage.read_json(f"{out}/run.json") or {})["configuration"].get("job")] = None
    names = list(segments(out))
    for name in dict.fromkeys([*names[:1], *names[-1:]]):
        with suppress(ValueError, KeyError, IndexError):
            owners[run_event(out, [name]).get("experiment")] = None
    return {owner for owner in owners if isinstance(owner, str)}


def _has(place: str) -> bool:
    fs, path = storage.file_system(place)
    with storage.access(place):
        return bool(fs.exists(path))

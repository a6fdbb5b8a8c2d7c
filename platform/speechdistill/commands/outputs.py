"""Trying the output folder of a job, and the place of its tracking."""

from speechdistill.io import outputs, storage
from speechdistill.tracking.run import checked_uri

_SPACE_BYTES = 1 << 24  # a first part: 64 samples of 7.68 s
_SQLITE = "sqlite:///"


def try_job(out: str, *names: str) -> None:
    """Try the files `names` in the folder `out` (or elsewhere, by full paths and URLs) and the place of its tracking,
    before the first file is read or the first model loaded.

    Raises `UserError` for what could not be written, or if the place of the tracking cannot be decided.
    """
    out = storage.absolute(out)
    uri = checked_uri(out)
    database = [uri.removeprefix(_SQLITE).partition("?")[0]] if uri.startswith(_SQLITE) else []
    files = [name if "://" in name or name.startswith("/") else f"{out}/{name}" for name in (*names, "tracking/events")]
    outputs.try_outputs(*files, *filter(None, database), space_bytes=_SPACE_BYTES)

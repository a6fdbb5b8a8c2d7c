"""Check of a path given as --clips that is not a readable file."""

from speechdistill.io import storage
from speechdistill.io.errors import TableError


def check(source: str) -> None:
    """Raise `TableError` for a path or URL that does not exist, and for a folder, which needs `ingest` first."""
    fs, path = storage.file_system(source)
    with storage.access(source):
        if fs.isfile(path):
            return
        is_folder, is_ingested = fs.isdir(path), fs.exists(f"{path}/clips.parquet")
    if not is_folder:
        reason = f"{source}: no such file"
        raise TableError(reason, "check the path; `speechdistill ingest` writes the manifest OUT/clips.parquet")
    ingest = f"run `speechdistill ingest --speech {source} --out OUT`, and give OUT/clips.parquet"
    raise TableError(f"{source} is a folder", f"give {source}/clips.parquet" if is_ingested else ingest)

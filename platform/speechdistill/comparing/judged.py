"""The clips that models are judged on, and reading them: what listeners scored, or samples of a label run."""

import hashlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from speechdistill.data import manifest_path, scored_clips
from speechdistill.engine.finished_run import LabelRun
from speechdistill.io import audio, fingerprint, storage, table
from speechdistill.io.errors import TableError

_LISTS = (".csv", ".jsonl", ".ndjson", ".parquet")
_THREADS = 16
_SAMPLE = ".parquet#"  # in the address of a sample: the shard, then the row group and the row in it


class Clip(NamedTuple):
    """`mos` is what a model should say of the audio at `uri`; `sha256` is that of its bytes, empty where they cannot be
    read. `plan` is a sample's, JSON."""

    clip_id: str
    uri: str
    sha256: str
    dataset: str
    system: str | None
    mos: float
    plan: str | None = None


class Judged(NamedTuple):
    """`judge` says whose scores `mos` are: listeners', or those of a teacher, whose weights' sha256 is `teacher`."""

    source: str
    clips: list[Clip]
    judge: str
    teacher: str | None = None


def clips(source: str) -> Judged:
    """A manifest or list of scored clips (`scored_clips.held_out`), or the folder of a label run.

    Of a label run those samples that no student of it is trained on, with the teacher's scores. Raises `TableError`
    for what is neither.
    """
    source = storage.absolute(source)
    if source.lower().endswith(_LISTS):
        return _scored(source)
    if storage.read_json(f"{source}/run.json") is None:
        manifest_path.check(source)
        reason = f"{source}: no list of scored clips ({', '.join(_LISTS)}), nor the folder of a label run"
        raise TableError(reason, "give one of these with --clips")
    return _labelled(source)


def read(uri: str) -> np.ndarray:
    """The wave of a clip, float32 at 16 kHz; raises `AudioError` or the storage's errors."""
    if _SAMPLE not in uri:
        return audio.load(uri)
    place, group, row = _of_sample(uri)
    rows = _group(place, group)
    return audio.decode(rows[0][row], rows[1][row])


def _scored(source: str) -> Judged:
    rows = scored_clips.held_out(source, headers=False)  # a broken file is rejected alone, when it is decoded
    uris = rows["uri"].to_pylist()
    with ThreadPoolExecutor(_THREADS) as threads:
        bar = tqdm(threads.map(_sha256, uris), total=len(uris), unit="clip", desc="hashing", dynamic_ncols=True)
        hashes = list(bar)
    columns = [rows[name].to_pylist() for name in ("clip_id", "system", "mos")]
    named = zip(columns[0], uris, hashes, scored_clips.dataset_names(rows), *columns[1:], strict=True)
    return Judged(source, [Clip(*values) for values in named], "listeners")


def _labelled(source: str) -> Judged:
    run = LabelRun(source)
    teacher = run.configuration["teacher"]
    found = list(_samples(run, run.configuration["recipe"]["name"]))
    return Judged(source, found, f"the teacher {teacher['name']}", teacher["sha256"])


def _samples(run: LabelRun, dataset: str) -> Iterator[Clip]:
    for group in run.held_out().tolist():
        place = f"{run.out}/{run.paths[run.file[group]]}#{run.in_file[group]}"
        for number, row in enumerate(run.read_group(group, "plan").to_pylist()):
            digest = hashlib.sha256(row["audio"]).hexdigest()
            yield Clip(str(row["sample_id"]), f"{place}.{number}", digest, dataset, None, row["score"], row["plan"])


def _of_sample(uri: str) -> tuple[str, int, int]:
    place, _, numbers = uri.rpartition("#")
    group, row = map(int, numbers.split("."))
    return place, group, row


@lru_cache(maxsize=2)  # samples are read in their order
def _group(place: str, group: int) -> tuple[list[bytes], list[str]]:
    import pyarrow.parquet as pq

    with table.open_parquet(place) as file:
        rows = pq.ParquetFile(file).read_row_group(group, ["audio", "audio_format"])
    return rows["audio"].to_pylist(), rows["audio_format"].to_pylist()


def _sha256(uri: str) -> str:
    try:
        return fingerprint.of_file(uri)
    except OSError:  # told with its reason when it is to be decoded
        return ""

"""The clips that models are judged by: clips that listeners scored, or samples of a label run."""

import hashlib
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from speechdistill.data import heard, manifest_path, scored_clips
from speechdistill.engine import held_out
from speechdistill.engine.finished_run import LabelRun
from speechdistill.io import audio, audio_files, storage, table, user_table
from speechdistill.io.errors import AudioError, TableError

_THREADS = 16
_SAMPLE = re.compile(r"(.+\.parquet)#(\d+)\.(\d+)", re.DOTALL)  # a sample: its shard, row group and row in it


class JudgedClip(NamedTuple):
    """A clip and its target score `mos`; `sha256` is the hash of its bytes, empty if they cannot be read.

    `plan` is the JSON of a sample's plan.
    """

    clip_id: str
    uri: str
    sha256: str
    dataset: str
    system: str | None
    mos: float
    plan: str | None = None


class Judged(NamedTuple):
    """Clips and their judge: listeners, or a teacher whose weights' sha256 is `teacher`.

    `run` is the label run of the samples, as `held_out.about` returns it.
    """

    source: str
    clips: list[JudgedClip]
    judge: str
    teacher: str | None = None
    run: dict[str, Any] | None = None

    def known_to(self, provenance: Mapping[str, Any]) -> Counter[str]:
        """Count the clips that a model was trained or selected on (`heard.TRAINED`, `heard.SELECTED`)."""
        if self.run:
            mark = heard.mark_of_samples(provenance, self.run)
            return Counter({mark: len(self.clips)} if mark else {})
        marks = heard.marks(provenance, [clip.clip_id for clip in self.clips])
        return Counter(mark for mark in marks if mark)


def clips(source: str) -> Judged:
    """Read a manifest or list of scored clips (`scored_clips.held_out`), or the folder of a label run.

    A label run gives its held-out samples that no student is trained or selected on, with the teacher's scores. Raises
    `TableError` for other sources, and for a run with too few clips to hold some out.
    """
    source = storage.absolute(source)
    if source.lower().endswith(user_table.SUFFIXES):
        return _scored(source)
    if storage.read_json(f"{source}/run.json") is None:
        manifest_path.check(source)
        reason = f"{source} is neither a list of scored clips nor the folder of a label run"
        raise TableError(reason, f"give one of these with --clips (a list ends in {', '.join(user_table.SUFFIXES)})")
    return _labelled(source)


def read(uri: str) -> np.ndarray:
    """Return the wave of a clip, float32 at 16 kHz; raises `AudioError` or the storage's errors."""
    sample = _SAMPLE.fullmatch(uri)
    if not sample:
        return audio.load(uri)
    rows, row = _group(sample[1], int(sample[2])), int(sample[3])
    return audio.decode(rows[0][row], rows[1][row])


def read_if_same(uri: str, sha256: str) -> np.ndarray:
    """Read a clip; raises `AudioError` if its bytes do not have this `sha256` any more: scores are cached by it.

    The hash is empty for a clip that could not be hashed.
    """
    wave = read(uri)
    sample = _SAMPLE.fullmatch(uri)
    if sample:
        digest = hashlib.sha256(_group(sample[1], int(sample[2]))[0][int(sample[3])]).hexdigest()
    else:
        digest = _sha256(uri)  # after decoding, to detect a change before or meanwhile
    if sha256 and digest != sha256:
        raise AudioError(uri, "has changed since it was hashed", "rerun the command")
    return wave


def _scored(source: str) -> Judged:
    rows = scored_clips.held_out(source, headers=False)  # a broken file is rejected when it is decoded
    uris = rows["uri"].to_pylist()
    with ThreadPoolExecutor(_THREADS) as threads:
        bar = tqdm(threads.map(_sha256, uris), total=len(uris), unit="clip", desc="hashing", dynamic_ncols=True)
        hashes = list(bar)
    columns = [rows[name].to_pylist() for name in ("clip_id", "system", "mos")]
    named = zip(columns[0], uris, hashes, scored_clips.dataset_names(rows), *columns[1:], strict=True)
    return Judged(source, [JudgedClip(*values) for values in named], "listeners")


def _labelled(source: str) -> Judged:
    run = LabelRun(source)
    teacher = run.configuration["teacher"]
    (held,) = held_out.held_out([run])
    if held.about and (few := held.about.get("too_few")):
        raise TableError(f"{source}: {few}", "label clips of more speakers, or give a list of scored clips")
    samples = list(_samples(run, held.test, run.configuration["recipe"]["name"]))
    about = held_out.about(run, held)
    return Judged(source, samples, f"the teacher {teacher['name']}", teacher["sha256"], about)


def _samples(run: LabelRun, places: np.ndarray, dataset: str) -> Iterator[JudgedClip]:
    for group, row in run.read(places, "plan"):
        uri = run.groups.address(group, row["row"])
        digest = hashlib.sha256(row["audio"]).hexdigest()
        yield JudgedClip(str(row["sample_id"]), uri, digest, dataset, None, row["score"], row["plan"])


@lru_cache(maxsize=2)  # samples are read in their order
def _group(place: str, group: int) -> tuple[list[bytes], list[str]]:
    import pyarrow.parquet as pq

    with table.open_parquet(place) as file:
        rows = pq.ParquetFile(file).read_row_group(group, ["audio", "audio_format"])
    return rows["audio"].to_pylist(), rows["audio_format"].to_pylist()


def _sha256(uri: str) -> str:
    digest = hashlib.sha256()
    try:
        with audio_files.source(uri) as file:  # a member of a tar, too
            while block := file.read(1 << 22):
                digest.update(block)
            file.raise_error()
    except (OSError, AudioError):  # reported when the clip is decoded
        return ""
    return digest.hexdigest()

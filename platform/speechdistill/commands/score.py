"""Score audio files with a model: patterns to paths, paths to rows, rows to a file."""

import csv
import io
import json
import logging
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

import numpy as np
import pyarrow as pa
import tyro
from tqdm import tqdm

from speechdistill.commands.guarded import guarded
from speechdistill.io import audio, console, outputs, places, storage, table
from speechdistill.io.errors import AudioError, StorageError, UserError
from speechdistill.io.places import Skipped
from speechdistill.models.label import Teacher, Unscorable
from speechdistill.models.load import load_teacher
from speechdistill.models.options import TeacherOptions

Row = dict[str, Any]

_LOG = logging.getLogger(__name__)
_WINDOW_S = 7.68
"""Most models score a file in windows of this length."""

_COLUMNS = {
    "path": pa.string(),
    "start_s": pa.float64(),
    "duration_s": pa.float64(),
    "mos": pa.float64(),
    "error": pa.string(),
}


@dataclass(frozen=True, kw_only=True)
class Score:
    """Score the quality of speech recordings: a MOS from 1 (bad) to 5 (excellent) per file.

    Exit code 1 if any file could not be scored; its row has the reason.
    """

    paths: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Files, folders, globs or URLs."""
    out: str | None = None
    """Write .csv, .parquet or .json instead of printing CSV."""
    timeline: bool = False
    """Return a score for every second of audio instead of one per file. A file shorter than a window of 7.68 s has one
    score."""
    model: str = "distillmos"
    """The model: distillmos, xlsr, dnsmos_p808, dnsmos_p835, squim, nisqa, utmos, or one that was trained here: the
    checkpoint's folder or URL, models:/NAME@champion, models:/NAME/VERSION or runs:/RUN_ID/student.
    ensemble:NAME=0.7,NAME=0.3 is a weighted mean of models."""
    weights: str | None = None
    """The model's weights: a file; for xlsr, and for a head that was trained here, the encoder's folder or
    hf://OWNER/NAME. Default: the released weights; for a head, the place of its encoder in training."""
    head: str | None = None
    """For model xlsr, the file of the head above the encoder. Default: the original one from the wheel xls-r-sqa."""
    tracking: str | None = None
    """Output folder whose mlflow.db has the student, if MLFLOW_TRACKING_URI is not set."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Arithmetic of the network."""
    hop_s: float = 1.0
    """Largest distance in seconds between the starts of 7.68 s windows of a file; 1 is the released model. 7.68 is a
    fast mode: 2 windows instead of 4 for 10 s, 8 instead of 54 for 60 s (up to 8.68 s nothing changes). It moved the
    scores of degraded clips of 10 to 20 s by 0.05 on average, 0.2 at most."""


@guarded("nothing was written")
def command(config: Annotated[Score, tyro.conf.arg(name="")]) -> int:
    writer(config.out)  # reports a wrong extension before any work
    if config.out:
        outputs.try_outputs(config.out)
    skipped = Skipped()
    paths = expand(config.paths, skipped)
    print(*skipped.lines(), sep="\n", end="\n" if skipped else "", file=sys.stderr)
    with _local(config.model, config.tracking) as model:
        options = TeacherOptions(weights=config.weights, head=config.head, dtype=config.dtype, hop_s=config.hop_s)
        teacher = load_teacher(model, options)
    if teacher.intrusive:
        reason = f"model {config.model} compares with clean speech, which only the labelling job has"
        raise UserError(reason, "give another --model")
    scored = _Scored(len(paths))
    write(scored.watch(score_files(paths, teacher, config.timeline)), config.out)
    if config.out:
        plural = "s" * (scored.files != 1)
        print(f"wrote {config.out}: {scored.files:,} file{plural}, {scored.failed:,} without a score")
    if scored.stopped:
        print(f"\nstopped after {scored.files} of {len(paths)} files; their rows are written", file=sys.stderr)
        return 130
    return 1 if scored.failed else 0


def score_files(paths: Iterable[str], teacher: Teacher, timeline: bool = False) -> Iterator[Row]:
    """Yield a row per file in order: path, duration_s, mos, error; with `timeline` a row per second of audio:
    path, start_s, mos, error.

    In each row either `mos` (1 to 5) or `error` is null: a file that cannot be read or scored, or a silent
    second, never ends the iteration. While one file is scored, a thread decodes the next.
    """
    rows = _seconds if timeline else _whole
    for path, wave in decoded(paths):
        yield from rows(path, wave, teacher)


def decoded(paths: Iterable[str]) -> Iterator[tuple[str, np.ndarray | Exception]]:
    """Yield each path with its mono wave at 16 kHz, or with the error; a thread decodes the next one meanwhile."""
    with ThreadPoolExecutor(1, thread_name_prefix="decode") as pool:
        ahead = None
        for path in paths:
            following = path, pool.submit(_load, path)
            if ahead:
                yield ahead[0], ahead[1].result()
            ahead = following
        if ahead:
            yield ahead[0], ahead[1].result()


def expand(patterns: Sequence[str], skipped: Skipped | None = None) -> list[str]:
    """Expand files, folders, globs and fsspec URLs to paths, each once, in the order of the patterns (`io/places.py`).

    `skipped` counts files that folders and globs leave out. Raises `UserError` with the pattern that matches nothing.
    """
    skipped = Skipped() if skipped is None else skipped
    fix = "give files, folders, globs or URLs of audio"
    if not patterns:
        raise UserError("there is nothing to score", fix)
    expanded: dict[str, None] = {}
    files: set[str] = set()
    for pattern in patterns:
        try:
            paths = places.matches(pattern, places.is_audio, skipped)
        except NotADirectoryError:
            paths = []
        if not paths:
            raise UserError(f"{pattern!r} matches no audio file", "; ".join([fix, *skipped.lines()]))
        new = list(places.once(paths, files))
        expanded |= dict.fromkeys(paths if paths == [pattern] else new)  # a path that is given is always taken
    return list(expanded)


def write(rows: Iterable[Mapping[str, Any]], out: str | None = None) -> None:
    """Write rows, whole or not at all, as .csv, .parquet or .json; without `out`, print them as CSV.

    Raises `UserError` for another extension before the first row is taken. Rows that can be neither written nor printed
    are kept in a file of the system's temporary folder, which the error names.
    """
    encode = writer(out)
    printable = [_printable(row) for row in rows]
    try:
        if out is not None:
            storage.publish(encode(printable), out)
        elif not console.printed(encode(printable).decode()):
            raise StorageError("not all rows could be printed", "give --out FILE")
    except StorageError as error:  # keeps hours of work
        kept = Path(tempfile.mkdtemp(prefix="speechdistill-scores-"), "scores.csv")
        kept.write_bytes(_csv(printable))
        raise StorageError(f"{error.reason}; all rows are in {kept}", error.fix) from error


def writer(out: str | None) -> Callable[[list[Row]], bytes]:
    """Return the encoder for a file name; raises `UserError` naming the extensions that exist."""
    suffix = ".csv" if out is None else PurePosixPath(out).suffix.lower()
    if suffix not in _WRITERS:
        raise UserError(f"{out!r}: extension {suffix!r}", f"choose from {', '.join(_WRITERS)}")
    return _WRITERS[suffix]


@contextmanager
def _local(model: str, out: str | None) -> Iterator[str]:
    """Yield a model's name; for an address in the MLflow of a folder of runs, a local copy of the model."""
    from speechdistill.tracking import registry
    from speechdistill.tracking.run import MODEL_ADDRESSES, tracking_uri

    if out is None or not model.startswith(MODEL_ADDRESSES):
        yield model
        return
    with registry.student_folder(model, tracking_uri(out)) as folder:
        yield folder


class _Scored:
    """Pass rows on with a progress bar, and count the failed ones; Ctrl-C ends the rows."""

    def __init__(self, total: int) -> None:
        self._total, self.files, self.failed, self.stopped = total, 0, 0, False

    def watch(self, rows: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        path, failed = None, False
        with tqdm(total=self._total, unit="file", dynamic_ncols=True) as bar:
            try:
                for row in rows:
                    if row["path"] != path:
                        path, failed = row["path"], False
                        self.files += 1
                        bar.update()
                    is_silent_second = row.get("start_s") is not None
                    if row["error"] is not None and not is_silent_second and not failed:
                        failed = True
                        self.failed += 1
                    yield row
            except KeyboardInterrupt:  # the rows so far are written
                self.stopped = True


def _load(path: str) -> np.ndarray | Exception:
    try:
        return audio.load(path)
    except Exception as error:  # becomes the file's row; object stores raise their own types of errors
        return error


def _whole(path: str, wave: np.ndarray | Exception, teacher: Teacher) -> Iterator[Row]:
    row: Row = {"path": path, "duration_s": None, "mos": None, "error": None}
    if isinstance(wave, Exception):
        yield row | {"error": _reason(wave)}
        return
    row["duration_s"] = len(wave) / audio.SAMPLE_RATE
    try:
        (label,) = teacher.label([wave])
    except RuntimeError as error:  # such as no GPU memory for this file; the other files are still scored
        yield row | {"error": _reason(error)}
        return
    yield row | ({"error": _reason(label)} if isinstance(label, Unscorable) else {"mos": label.score})


def _seconds(path: str, wave: np.ndarray | Exception, teacher: Teacher) -> Iterator[Row]:
    row: Row = {"path": path, "start_s": None, "mos": None, "error": None}
    if isinstance(wave, Exception):
        yield row | {"error": _reason(wave)}
        return
    try:
        scores = teacher.timeline(wave)
    except Unscorable as error:
        yield row | {"error": _reason(error)}
        return
    duration_s = len(wave) / audio.SAMPLE_RATE
    if len(scores) > 1 and duration_s < _WINDOW_S and len({mos for _, mos in scores}) == 1:
        text = "%s: %.2f s is shorter than one window of %g s: one score for all of it instead of a timeline"
        _LOG.warning(text, path, duration_s, _WINDOW_S)
        scores = scores[:1]
    for start_s, mos in scores:
        yield row | {"start_s": start_s, "mos": mos, "error": "silent" if mos is None else None}


def _reason(error: Exception) -> str:
    if isinstance(error, AudioError):  # the row has the path
        return f"{error.reason}; {error.fix}"
    return str(error) if isinstance(error, Unscorable) else f"{type(error).__name__}: {error}"


def _printable(row: Mapping[str, Any]) -> Row:
    """Escape file names that are not UTF-8: Python holds such bytes as surrogates, which no format can."""
    return {
        key: value.encode("utf-8", "backslashreplace").decode() if isinstance(value, str) else value
        for key, value in row.items()
    }


def _csv(rows: list[Row]) -> bytes:
    text = io.StringIO(newline="")
    lines = csv.DictWriter(text, _columns(rows), lineterminator="\n")
    lines.writeheader()
    lines.writerows(rows)
    return text.getvalue().encode()


def _json(rows: list[Row]) -> bytes:
    return (json.dumps(rows, indent=2, ensure_ascii=False) + "\n").encode()


def _parquet(rows: list[Row]) -> bytes:
    columns = [pa.array([row[name] for row in rows], _COLUMNS[name]) for name in _columns(rows)]
    return table.parquet_bytes(pa.Table.from_arrays(columns, names=_columns(rows)))


def _columns(rows: list[Row]) -> list[str]:
    return list(rows[0]) if rows else ["path", "duration_s", "mos", "error"]


_WRITERS: dict[str, Callable[[list[Row]], bytes]] = {".csv": _csv, ".parquet": _parquet, ".json": _json}

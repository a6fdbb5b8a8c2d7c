"""Look into labelled shards: their first samples as a table, and as WAV files."""

import json
import logging
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from io import BytesIO
from typing import Annotated, Any

import numpy as np
import pyarrow.parquet as pq
import tyro

from speechdistill.commands.guarded import guarded
from speechdistill.comparing.tables import as_text
from speechdistill.data.plan import Plan
from speechdistill.engine.shards import ROW_GROUP
from speechdistill.io import audio, outputs, storage, table
from speechdistill.io.errors import AudioError, TableError
from speechdistill.io.options import at_least

_COLUMNS = ("sample_id", "score", "speaker", "num_samples", "plan")
_AUDIO = ("audio", "audio_format")
_FIX = "give the --out folder of pseudolabel, or a file of its shards"
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Head:
    """Print the first samples of a label run as a table, and export them as WAV files."""

    place: Annotated[str, tyro.conf.Positional]
    """Folder of a label run or of its shards, or one shard; a local path or URL."""
    rows: int = 10
    """Samples to show."""
    wav: str | None = None
    """Folder for the samples as WAV files: ID-degraded.wav and ID-clean.wav."""

    def __post_init__(self) -> None:
        at_least(self, rows=1)


@guarded("nothing was changed")
def command(
    config: Annotated[
        Annotated[Head, tyro.conf.subcommand("head")] | Annotated[None, tyro.conf.Suppress], tyro.conf.arg(name="")
    ],
) -> int:
    """Show the first samples of a label run, and export them as WAV files."""
    assert config
    rows = list(head(config.place, config.rows, with_audio=config.wav is not None))
    print(as_text([["id", "score", "speaker", "duration", "steps"], *map(_shown, rows)]))
    if config.wav:
        written = export(rows, config.wav)
        print(f"wrote {written} files to {config.wav}", file=sys.stderr)
    return 0


def head(place: str, count: int, with_audio: bool = False) -> Iterator[dict[str, Any]]:
    """Yield the first rows of the shards at a place; raises `TableError` if there are none."""
    place = storage.absolute(place)
    columns = [*_COLUMNS, *(_AUDIO if with_audio else ())]
    left = count
    for file in _files(place):
        with table.open_parquet(file) as opened:
            shard = pq.ParquetFile(opened)
            if missing := sorted({*columns} - {*shard.schema_arrow.names}):
                raise TableError(f"{file} is not a shard of labels: it lacks {', '.join(missing)}", _FIX)
            if with_audio and "reference" in shard.schema_arrow.names:
                columns = list(dict.fromkeys([*columns, "reference"]))
            for batch in shard.iter_batches(min(left, ROW_GROUP), columns=columns):
                rows = batch.to_pylist()[:left]
                left -= len(rows)
                yield from rows
                if not left:
                    return


def export(rows: list[dict[str, Any]], folder: str) -> int:
    """Write the degraded and the clean segment of each row as WAV files; return the number of files.

    A clean segment that was not stored is cut from its recording again. Generated speech has none.
    """
    folder = storage.absolute(folder)
    outputs.try_outputs(*(f"{folder}/{row['sample_id']}-degraded.wav" for row in rows[:1]))
    written = 0
    for row in rows:
        waves = {"degraded": audio.decode(row["audio"], row["audio_format"]), "clean": _clean(row)}
        for name, wave in waves.items():
            if wave is not None:
                storage.publish(_wav(wave), f"{folder}/{row['sample_id']}-{name}.wav")
                written += 1
    return written


def _files(place: str) -> list[str]:
    if place.lower().endswith(".parquet"):
        return [place]
    fs, path = storage.file_system(place)
    with storage.access(place):
        files = fs.glob(f"{path}/shards/part-*.parquet") or fs.glob(f"{path}/part-*.parquet")
    # A part that has grown may have an older file beside the current one, which sorts before it.
    parts = {str(file).rpartition("-")[0]: file for file in sorted(files)}
    if not parts:
        raise TableError(f"{place} holds no shards of labels", _FIX)
    return [str(fs.unstrip_protocol(file)).removeprefix("file://") for file in parts.values()]


def _shown(row: dict[str, Any]) -> list[str]:
    steps = " + ".join(step["step"] for step in json.loads(row["plan"])["steps"]) or "as recorded"
    duration = f"{row['num_samples'] / audio.SAMPLE_RATE:.2f} s"
    return [str(row["sample_id"]), f"{row['score']:.2f}", row["speaker"] or "–", duration, steps]


def _clean(row: dict[str, Any]) -> np.ndarray | None:
    from speechdistill.labelling.samples import make_sample

    if row.get("reference"):
        return audio.decode(row["reference"], row["audio_format"])
    plan = Plan.from_json(row["plan"])
    if plan.is_generated:
        return None
    try:
        return make_sample(replace(plan, steps=()))[1]
    except (AudioError, OSError) as error:
        _LOG.warning("sample %s has no clean file: %s", row["sample_id"], error)
        return None


def _wav(wave: np.ndarray) -> bytes:
    import soundfile

    data = BytesIO()
    samples = wave if wave.dtype == np.int16 else audio.quantise(wave)
    soundfile.write(data, samples, audio.SAMPLE_RATE, format="WAV", subtype="PCM_16")
    return data.getvalue()

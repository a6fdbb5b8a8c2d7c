"""Label runs and scored clips for tests, and what a run has committed."""

from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import soundfile

from manifests import row
from milli import Degrade, Teach
from speechdistill.engine import shards
from speechdistill.engine.isolate import Row
from speechdistill.io import table
from speechdistill.labelling.samples import DEGRADED, TAUGHT


def label_run(
    out: Path,
    num_ids: int,
    seed: int = 0,
    rows_per_part: int = 24,
    fails: tuple[int, ...] = (),
    known: Callable[[int], Mapping[str, object]] = lambda number: {},
) -> str:
    """A complete label run of the milli flow, made without Ray; parts of 24 ids are of two row groups.

    `known` are columns of a sample, such as its clip_ids.
    """
    layout = shards.Layout(
        out=str(out),
        schema="pseudolabel.v1",
        id_column="sample_id",
        num_ids=num_ids,
        rows_per_part=rows_per_part,
        totals=lambda rows: {},
    )
    shards.claim(layout.out, {"seed": seed})
    for k in range(layout.num_parts):
        ids = [{"id": i} for i in layout.ids(k)]
        rows = [
            _taught({**one, **_or_reject(result), **known(one["id"])})
            for one, result in zip(ids, Degrade(fails)(ids), strict=True)
        ]
        schema = pa.schema([("id", pa.int64()), *DEGRADED, *TAUGHT, *shards.REJECT])
        shards.write_parts(pa.Table.from_pylist(rows, schema), layout)
    shards.finish(layout)
    shards.complete(str(out), {})
    return str(out)


def _or_reject(result: Row | Exception) -> Row:
    reason = ("degrade", type(result).__name__, str(result))
    return dict(zip(shards.REJECT.names, reason, strict=True)) if isinstance(result, Exception) else result


def _taught(row: Row) -> Row:
    (result,) = [{}] if "reject_stage" in row else Teach()([row])
    return {**row, **result}


def some_clips(folder: Path, count: int = 12) -> pa.Table:
    """Scored clips of two datasets on the disk."""
    rows = []
    for i in range(count):
        path = folder / f"{i}.wav"
        soundfile.write(path, np.full(1600 * (i + 1), i / 100), 16000)
        rows.append(row(str(path), duration_s=0.1 * (i + 1), mos=1 + i / 4, dataset="ab"[i % 3 == 0], speaker=f"s{i}"))
    return table.from_rows(rows, "clip.v1")


def rows_of(out: Path) -> dict[int, dict]:
    rows = [row for file in sorted((out / "shards").glob("*.parquet")) for row in pq.read_table(file).to_pylist()]
    assert len({row["sample_id"] for row in rows}) == len(rows), "a sample stands in two rows"
    return {row["sample_id"]: row for row in rows}


def assert_exactly_once(out: Path, num_ids: int) -> None:
    counts = Counter([*rows_of(out), *rejects_of(out)])
    assert counts == Counter(range(num_ids))


def contents(out: Path) -> list[str]:
    return table.read(f"{out}/manifest.parquet", "shard.v1")["content_sha256"].to_pylist()


def rejects_of(out: Path) -> dict[int, dict]:
    rows = table.read(f"{out}/rejects/rejects.parquet", "reject.v1").to_pylist()
    assert len({row["id"] for row in rows}) == len(rows)
    return {int(row["id"]): row for row in rows}

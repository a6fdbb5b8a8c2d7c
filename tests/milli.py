"""A millisecond flow for engine tests: real stages, shards and schema, with tiny waves instead of speech.

Runs as a program too (`python tests/milli.py OUT NUM_IDS [ADDRESS]`), so that tests can kill its driver. ADDRESS is a
Ray whose workers find the package by themselves.
"""

import os
import signal
import sys
import threading
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import ray

from configs import changed
from speechdistill.engine import flow, shards
from speechdistill.engine.isolate import Row
from speechdistill.engine.pools import Pool
from speechdistill.engine.stages import Stage
from speechdistill.io import audio, table
from speechdistill.io.errors import WeightsError
from speechdistill.labelling.samples import DEGRADED, TAUGHT

COLUMNS = [name for name in table.schema("pseudolabel.v1").names if name != "sample_id"]


@dataclass(frozen=True)
class Degrade:
    """id -> a wave of it. Raises on `fails`; aborts its process on `aborts`; fills its memory on `hoards`; is killed on
    `killed` once (a file in `marks`).
    """

    fails: tuple[int, ...] = ()
    aborts: tuple[int, ...] = ()
    hoards: tuple[int, ...] = ()
    killed: tuple[int, ...] = ()
    marks: str = ""

    def __call__(self, rows: list[Row]) -> list[Row | Exception]:
        return [self._one(row["id"]) for row in rows]

    def _one(self, sample_id: int) -> Row | Exception:
        if sample_id in self.aborts:
            os.abort()
        if sample_id in self.hoards:
            np.ones(2**30)  # 8 GiB
        if sample_id in self.fails:
            return ValueError(f"id {sample_id} is bad")
        kill_once(sample_id, self.killed, self.marks)
        wave = np.random.default_rng(sample_id).integers(-99, 99, 160).astype(np.int16)
        return {
            "audio": audio.encode(wave, "pcm16"),
            "audio_format": "pcm16",
            "sample_rate": 16000,
            "num_samples": len(wave),
            "plan": "{}",
            "clip_ids": [str(sample_id)],
            "segment_start_s": 0.0,
            "segment_duration_s": 0.01,
        }


@dataclass(frozen=True)
class Teach:
    """A wave -> its mean. Raises for the whole batch where an id is in `fails`; is killed on `killed` and hangs on
    `hangs`, once each (a file in `marks`).

    `waits_for` = (id, folder): that id is not worked on before the folder exists; gives up after a minute.
    """

    fails: tuple[int, ...] = ()
    killed: tuple[int, ...] = ()
    hangs: tuple[int, ...] = ()
    marks: str = ""
    waits_for: tuple[int, str] | None = None

    def __call__(self, rows: list[Row]) -> list[Row | Exception]:
        if bad := [row["id"] for row in rows if row["id"] in self.fails]:
            raise ArithmeticError(f"no score for {bad}")
        for row in rows:
            kill_once(row["id"], self.killed, self.marks)
            if row["id"] in self.hangs and not (mark := Path(self.marks) / f"hung-{row['id']}").exists():
                mark.touch()
                threading.Event().wait()
            if self.waits_for and self.waits_for[0] == row["id"]:
                wait_for(Path(self.waits_for[1]))
        means = [float(audio.decode(row["audio"], "pcm16").mean()) for row in rows]
        return [{"score": m, "logit": m, "teacher": "milli", "teacher_hash": "0"} for m in means]


def wait_for(path: Path) -> None:
    pause, end = threading.Event(), time.monotonic() + 60
    while not path.exists():
        if time.monotonic() > end:
            raise TimeoutError(f"{path} did not appear")
        pause.wait(0.05)


def kill_once(sample_id: int, killed: tuple[int, ...], marks: str) -> None:
    mark = Path(marks) / f"killed-{sample_id}"
    if sample_id in killed and not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)


def no_weights() -> Teach:
    raise WeightsError("no weights on this node", "install them")


def wrong_network() -> Teach:
    raise RuntimeError("shape mismatch")


def totals(rows: pa.Table) -> dict[str, float]:
    return {"audio_s": sum(rows["num_samples"].to_pylist()) / audio.SAMPLE_RATE}


def milli_flow(
    out: object, num_ids: int, degrade: Degrade = Degrade(), teach: Teach = Teach(), **options: object
) -> flow.Flow:
    milli = flow.Flow(
        layout=shards.Layout(
            out=str(out),
            schema="pseudolabel.v1",
            id_column="sample_id",
            num_ids=num_ids,
            rows_per_part=8,
            totals=totals,
        ),
        identity={"seed": options.pop("seed", 0)},
        stages=lambda cpus, gpus: (
            Stage(
                name="degrade",
                make=partial(_same, degrade),
                adds=DEGRADED,
                isolated=True,
                memory_gb=4,
            ),
            Stage(name="teach", make=partial(_same, teach), adds=TAUGHT, pool=Pool(2), batch_rows=4, calls=2),
        ),
    )
    return changed(milli, **options)


def _same(worker: Degrade | Teach) -> Degrade | Teach:
    return worker


if __name__ == "__main__":
    if sys.argv[3:]:
        ray.init(sys.argv[3])
    flow.run(milli_flow(sys.argv[1], int(sys.argv[2])))

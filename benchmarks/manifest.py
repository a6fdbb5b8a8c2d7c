"""The cost of a manifest for a worker that degrades, by its number of clips: own memory, start, planning.

For each size two workers run in child processes as in the labelling job, so that what they share is not counted as
either's own. Rows are synthetic: one speaker in fifty clips, addresses of 90 characters.
"""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import tyro

from speechdistill.data import clips
from speechdistill.data.degradation_recipes import weights_free
from speechdistill.data.plan import Plans
from speechdistill.engine.isolate import Isolated, Row
from speechdistill.io import fingerprint, table
from speechdistill.labelling.samples import Degrade, libraries

MB = 1e6
CHUNK, REPEATS = 500_000, 10


@dataclass(frozen=True)
class Options:
    """Some four minutes on one core, and 2 GB of disk."""

    clips: tuple[int, ...] = (1_000, 10_000, 100_000, 1_000_000, 10_000_000)
    """Clips of each manifest."""
    plans: int = 2_000
    """Samples that are planned for a mean; the best of ten such means counts, since the machine may do other work."""
    folder: str | None = None
    """A folder with room. Default: the system's temporary folder."""


def main(options: Options) -> None:
    print(
        "| clips | copy made in, s | at most, GB | its size, GB | worker starts in, s | CPU of that until a plan, s ",
        end="",
    )
    print("| own memory, MB | more than the first, MB | a plan, µs | times the first | speaker's clips, µs |")
    print("|" + "---|" * 11, flush=True)
    first: dict[str, float] = {}
    for count in options.clips:
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            os.environ["SPEECHDISTILL_CACHE"] = f"{folder}/cache"
            manifest = f"{folder}/clips.parquet"
            table.publish_stream(synthetic(count), "clip.v1", manifest)
            seconds, peak_gb, copy = _shared(manifest)
            row = _workers(copy, options.plans)
            first = first or row
            own_mb, plan_us = row["own_mb"], row["plan_us"]
            size_gb = Path(copy).stat().st_size / 1e9
        print(f"| {count:,} | {seconds:.1f} | {peak_gb:.2f} | {size_gb:.2f} | {row['start_s']:.1f} ", end="")
        print(f"| {row['clips_s']:.2f} | {own_mb:.0f} | {own_mb - first['own_mb']:.0f} | {plan_us:.0f} ", end="")
        print(f"| {plan_us / first['plan_us']:.2f} | {row['speaker_us']:.0f} |", flush=True)


def synthetic(count: int) -> Iterator[pa.Table]:
    """Clips of files that do not exist: of a thousand, 970 speech, 20 noise and 10 rooms, blocks of each."""
    rng = np.random.default_rng(count)
    for begin in range(0, count, CHUNK):
        numbers = np.arange(begin, min(begin + CHUNK, count))
        text = pc.utf8_lpad(pa.array(numbers).cast(pa.string()), 12, "0")
        kinds = np.where(numbers % 1000 < 970, "speech", np.where(numbers % 1000 < 990, "noise", "rir"))
        speakers = pa.array(rng.integers(0, max(1, count // 50), len(numbers))).cast(pa.string())
        speakers = pc.binary_join_element_wise("reader", pc.utf8_lpad(speakers, 8, "0"), "-")
        folder = "s3://speech-corpora-of-the-world/librilight/unlab-60k/small/en/"
        about = {
            "clip_id": pc.binary_join_element_wise("clip", text, ""),
            "uri": pc.binary_join_element_wise(folder, speakers, "/", text, ".flac", ""),
            "kind": pa.array(kinds),
            "duration_s": pa.array(rng.uniform(2, 20, len(numbers))),
            "sample_rate": pa.array(np.full(len(numbers), 16_000, np.int32)),
            "channels": pa.array(np.ones(len(numbers), np.int32)),
            "speaker": pc.if_else(pa.array(kinds == "speech"), speakers, pa.scalar(None, pa.string())),
        }
        yield table.validate(pa.table(about), "clip.v1")


def _shared(manifest: str) -> tuple[float, float, str]:
    """Seconds and peak memory in GB of the process that makes the copy, and its path."""
    run = subprocess.run([sys.executable, __file__, "--share", manifest], stdout=subprocess.PIPE, check=True, text=True)
    seconds, peak, copy = run.stdout.split()
    return float(seconds), float(peak) / 1e9, copy


def share(manifest: str) -> None:
    start = time.perf_counter()
    copy = clips.share(manifest, str(Path(manifest).parent), fingerprint.of_file(manifest))
    seconds = time.perf_counter() - start
    # Not getrusage: its maximum is inherited from the process that forked this one.
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    print(seconds, int(lines["VmHWM"].split()[0]) * 1024, copy)


def _workers(copy: str, plans: int) -> dict[str, float]:
    """The measurements of the second of two workers."""
    works = []
    for _ in range(2):
        start = time.perf_counter()
        works.append(Isolated(partial(Measured, copy)))
        start_s = time.perf_counter() - start
    for work in works:
        (row,) = work([{"plans": plans}])
        if isinstance(row, Exception):
            raise row
    return {"start_s": start_s, **row}


class Measured:
    """The worker of the labelling job, which plans samples and opens no audio."""

    def __init__(self, copy: str) -> None:
        recipe = weights_free()
        start = time.process_time()
        Plans(recipe, clips.Clips.read(copy), 0)[0]  # with the order of the first epoch, which the next line finds
        self._clips_s = time.process_time() - start
        self._work = Degrade(copy, recipe, 0, "flac", False, libraries(recipe))

    def __call__(self, rows: list[Row]) -> list[Row | Exception]:
        return [self._measured(row["plans"]) for row in rows]

    def _measured(self, number: int) -> Row:
        plans, pool = self._work._plans, self._work._clips.speech
        ids = np.random.default_rng(1).integers(0, len(plans), number * REPEATS)
        plan_us = min(_cost_us(plans.__getitem__, some) for some in np.split(ids, REPEATS))
        speaker_us = min(_cost_us(lambda i: pool.of_speaker(pool[i].speaker), some) for some in np.split(ids, REPEATS))
        lines = dict(line.split(":", 1) for line in Path("/proc/self/smaps_rollup").read_text().splitlines()[1:])
        own = sum(int(lines[name].split()[0]) * 1024 for name in ("Private_Clean", "Private_Dirty"))
        return {"plan_us": plan_us, "speaker_us": speaker_us, "own_mb": own / MB, "clips_s": self._clips_s}


def _cost_us(work: Callable[[int], object], ids: np.ndarray) -> float:
    numbers = ids.tolist()
    start = time.process_time()
    for i in numbers:
        work(i)
    return 1e6 * (time.process_time() - start) / len(numbers)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--share"]:
        share(sys.argv[2])
    else:
        main(tyro.cli(Options))

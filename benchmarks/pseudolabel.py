"""What the labelling job costs beside its work: throughput against a plain loop, memory and planning as runs grow."""

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from os import sched_getaffinity, sched_setaffinity
from pathlib import Path
from typing import Literal

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import tyro

from speechdistill.commands import score
from speechdistill.data.clips import Clips, clip_id
from speechdistill.data.degradation_recipes import weights_free
from speechdistill.data.plan import Plans
from speechdistill.io import audio, storage, table
from speechdistill.labelling.samples import make_sample
from speechdistill.models.options import TeacherOptions

ROOT = Path(__file__).resolve().parents[1]
RECORDINGS = ROOT.parent / "shared" / "data" / "speech"
SEED = 1

CORES = (1, 2)
LOOP_SAMPLES = 100  # before the job, and other ones after it
JOB_SAMPLES = 400  # per core

MEMORY_SAMPLES = (400, 4000)
# To take minutes: short segments in bfloat16. With its reference, in PCM, a sample has the bytes of 7.68 s in FLAC.
MEMORY_OPTIONS = ("--segment-s", "2", "--dtype", "bfloat16", "--audio-format", "pcm16", "--reference")

PLANNED_CLIPS = (1_000, 1_000_000)
PLANNED_ROUNDS, PLANNED_IDS = 60, 500


@dataclass(frozen=True)
class Options:
    """Three ratios that show what the job costs beside its work; about twelve minutes on two cores."""

    only: Literal["speed", "memory", "planning"] | None = None
    """One of the three."""
    speech: str | None = None
    """Folder of speech recordings. Default: ../shared/data/speech if it is there, else synthesised speech."""


def main(options: Options) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if options.only != "planning":
            _write_manifest(options.speech, folder)
        if options.only in (None, "speed"):
            speed(folder)
        if options.only in (None, "memory"):
            memory(folder)
        if options.only in (None, "planning"):
            planning()


def speed(folder: Path) -> None:
    """The job's steady state against a plain loop over the same plans, on the same cores.

    The loop runs on one of the cores before and after the job. CPU time is that of all processes of the job, and
    says how much the job does beside the loop's work; on a busy machine it is the steadier ratio.
    """
    cores = sorted(sched_getaffinity(0))
    print("\nSamples of 7.68 s per second and core used; of the job, its last four fifths (target: 0.9)\n")
    print("| cores | plain loop | job | ratio | ratio by CPU time |\n|---|---|---|---|---|", flush=True)
    for count in CORES[: len(cores)]:
        out = folder / f"speed{count}"
        loops = [_loop(folder, cores[0], 0)]
        log = _job(out, cores[:count], count * JOB_SAMPLES, _cpu, 1.0)
        loops.append(_loop(folder, cores[0], LOOP_SAMPLES))
        loop_s, loop_cpu_s = np.mean(loops, axis=0)
        times, samples = _commits(out)
        rate = float(np.polyfit(times, samples, 1)[0]) / count  # parts arrive in bursts, one per actor
        cpu_s = _cpu_between(log, times[0], times[-1]) / (samples[-1] - samples[0])
        print(
            f"| {count} | {1 / loop_s:.2f} | {rate:.2f} | {rate * loop_s:.2f} | {loop_cpu_s / cpu_s:.2f} |", flush=True
        )


def memory(folder: Path) -> None:
    """Peak memory of the job, driver, Ray and workers together, at ten times as many samples."""
    print("\nPeak memory (proportional set size) of driver, Ray and workers together, sampled twice a second;")
    print(f"with {' '.join(MEMORY_OPTIONS)}\n\n| samples | peak, GiB |\n|---|---|", flush=True)
    cores = sorted(sched_getaffinity(0))[: max(CORES)]
    peaks = []
    for samples in MEMORY_SAMPLES:
        log = _job(folder / f"memory{samples}", cores, samples, _pss, 0.5, *MEMORY_OPTIONS)
        peaks.append(max(sum(pss.values()) for _, pss in log))
        print(f"| {samples:,} | {peaks[-1] / 2**30:.2f} |", flush=True)
    print(f"\nratio (target: at most 1.15): {peaks[-1] / peaks[0]:.2f}", flush=True)


def planning() -> None:
    """CPU time of a plan from manifests of two sizes, over ids in the order in which the job walks them."""
    plans = [Plans(weights_free(), _clips(count), SEED) for count in PLANNED_CLIPS]
    seconds = np.zeros((PLANNED_ROUNDS, len(plans)))
    for turn in range(PLANNED_ROUNDS):
        for i, planned in enumerate(plans):
            first = turn * PLANNED_IDS
            planned[first]  # its permutation, which a run keeps, was pushed out by the other manifest's
            start = time.process_time()
            for sample_id in range(first, first + PLANNED_IDS):
                planned[sample_id]
            seconds[turn, i] = (time.process_time() - start) / PLANNED_IDS
    print("\nPlanning, CPU time per sample\n\n| clips | µs |\n|---|---|")
    for count, taken in zip(PLANNED_CLIPS, np.median(seconds, axis=0), strict=True):
        print(f"| {count:,} | {taken * 1e6:.1f} |")
    print(f"\nratio (target: at most 1.1): {np.median(seconds[:, 1] / seconds[:, 0]):.3f}", flush=True)


def loop(clips: str, core: int, first: int) -> None:
    """The job's work without the job; prints wall and CPU seconds per sample."""
    sched_setaffinity(0, {core})
    import torch

    from speechdistill.models.load import load_teacher

    torch.set_num_threads(1)
    plans = Plans(weights_free(), Clips.read(clips), SEED)
    teacher = load_teacher("distillmos", TeacherOptions(device="cpu"))

    def label(sample_id: int) -> None:
        pcm, _ = make_sample(plans[sample_id])
        audio.encode(pcm, "flac")
        teacher.label([pcm / np.float32(32768)])

    for sample_id in range(first, first + 5):  # imports and kernels
        label(sample_id)
    wall, cpu = time.perf_counter(), time.process_time()
    for sample_id in range(first, first + LOOP_SAMPLES):
        label(sample_id)
    print((time.perf_counter() - wall) / LOOP_SAMPLES, (time.process_time() - cpu) / LOOP_SAMPLES)


def _loop(folder: Path, core: int, first: int) -> tuple[float, float]:
    command = [sys.executable, __file__, "--loop", str(folder / "clips.parquet"), str(core), str(first)]
    wall_s, cpu_s = subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout.split()
    return float(wall_s), float(cpu_s)


def _job(
    out: Path,
    cores: Sequence[int],
    samples: int,
    measure: Callable[[psutil.Process], float],
    every_s: float,
    *more: str,
) -> list[tuple[float, dict[int, float]]]:
    """Run the job on `cores`; (time, `measure` of each of its processes) every so often."""
    script = [sys.executable, str(ROOT / "jobs" / "pseudolabel.py"), "--clips", str(out.parent / "clips.parquet")]
    numbers = ["--num-samples", str(samples), "--seed", str(SEED), "--rows-per-part", "16"]
    pinned = ["taskset", "--cpu-list", ",".join(map(str, cores)), *script, "--out", str(out), *numbers, *more]
    log = []
    with Path(f"{out}.log").open("w+") as text, subprocess.Popen(pinned, stdout=text, stderr=text) as job:
        while job.poll() is None:
            log.append((time.time(), _measured(job.pid, measure)))
            time.sleep(every_s)
        if job.returncode:
            text.seek(0)
            raise SystemExit(text.read())
    return log


def _measured(pid: int, measure: Callable[[psutil.Process], float]) -> dict[int, float]:
    """Of a process and its descendants, less those that end meanwhile."""
    found = {}
    with suppress(psutil.Error):
        for process in (psutil.Process(pid), *psutil.Process(pid).children(recursive=True)):
            with suppress(psutil.Error):
                found[process.pid] = measure(process)
    return found


def _cpu(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def _cpu_between(log: list[tuple[float, dict[int, float]]], start: float, end: float) -> float:
    """CPU seconds of all processes in a stretch of time; those that ended keep what they had."""
    seen: dict[int, float] = {}
    totals = []
    for _, cpu_s in log:
        seen |= cpu_s
        totals.append(sum(seen.values()))
    at_start, at_end = np.interp((start, end), [at for at, _ in log], totals)
    return float(at_end - at_start)


def _pss(process: psutil.Process) -> float:
    return float(process.memory_full_info().pss)


def _commits(out: Path) -> tuple[np.ndarray, np.ndarray]:
    """When the parts of the steady state were committed, and how many samples there were then."""
    parts = sorted((out / "shards").glob("part-*.parquet"), key=lambda part: part.stat().st_mtime)
    times = np.array([part.stat().st_mtime for part in parts])
    samples = np.cumsum([pq.read_metadata(part).num_rows for part in parts])
    steady = len(parts) // 5  # before that the second actor starts
    return times[steady:], samples[steady:]


def _write_manifest(speech: str | None, folder: Path) -> None:
    rows = []
    for path in _recordings(speech, folder):
        info = audio.probe(path)
        known = {"duration_s": info.num_samples / audio.SAMPLE_RATE, "sample_rate": info.sample_rate, "channels": 1}
        rows.append({"clip_id": clip_id("speech", path), "uri": path, "kind": "speech", **known})
    storage.publish(table.parquet_bytes(table.from_rows(rows, "clip.v1")), str(folder / "clips.parquet"))


def _recordings(speech: str | None, folder: Path) -> list[str]:
    if speech or RECORDINGS.is_dir():
        return score.expand([speech or str(RECORDINGS)])
    from speechdistill.data.corpora import espeak

    return [row["uri"] for row in espeak.rows(folder / "synthetic") if row["kind"] == "speech"]


def _clips(count: int) -> Clips:
    """Files that do not exist, since plans open none: nine tenths speech, the rest noise and rooms."""
    rng = np.random.default_rng(0)
    numbers = np.arange(count)
    return Clips(
        pa.table(
            {
                "clip_id": [f"{number:016x}" for number in rng.permutation(count)],
                "uri": [f"/data/speech/{number // 1000}/{number}.flac" for number in numbers],
                "kind": np.array(["noise", "rir", *["speech"] * 18])[numbers % 20],
                "duration_s": rng.uniform(2, 20, count),
                "speaker": [f"speaker{number // 100}" for number in numbers],
            }
        )
    )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--loop"]:
        loop(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
    else:
        main(tyro.cli(Options))

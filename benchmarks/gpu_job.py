"""The labelling job on a machine with a GPU: its speed, and that of its two stages alone."""

import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import psutil
import pyarrow.parquet as pq
import torch
from figures import tell

from speechdistill.data.degradation_recipes import weights_free
from speechdistill.labelling.samples import Degrade, libraries
from speechdistill.labelling.teach import Teach
from speechdistill.models.load import load_teacher
from speechdistill.models.options import TeacherOptions

ROOT = Path(__file__).resolve().parents[1]
SEGMENT_S, SEED = 7.68, 1


@dataclass(frozen=True)
class Place:
    """The clips and folder of a job, its device, about how long it runs, and the samples of a part."""

    clips: str
    out: Path
    device: str
    wanted_s: float
    part: int


def measure(audio: Path, out: Path, device: str, debug: bool) -> None:
    """Tell the figures of section `job`."""
    out.mkdir(parents=True, exist_ok=True)
    folders = [word for kind in ("speech", "noise", "rir") for word in (f"--{kind}", str(audio / kind))]
    _run([sys.executable, str(ROOT / "jobs" / "ingest.py"), *folders, "--out", str(out / "manifest")])
    place = Place(str(out / "manifest" / "clips.parquet"), out, device, *((2.0, 16) if debug else (12.0, 64)))
    processes = 1 if debug else max(1, (os.cpu_count() or 2) - 1)
    degraded = degrading(place, processes)
    tell("job", f"degrading alone, {processes} processes", degraded, "samples/s")
    teachers = {"distillmos": []} if debug else {"distillmos": [], "xlsr": xlsr(out)}
    for name, options in teachers.items():
        taught = teaching(place, name, options, 8 if debug else 64)
        tell("job", f"{name} alone", taught, "samples/s")
        slower = min(degraded, taught)
        runs: dict[str, list[str]] = {name: []}
        if name == "distillmos":
            half = ["--teach-gpus", "0.5"] if device == "cuda" else []
            runs["two teachers, one killed"] = ["--teach-actors", "2", *half]
        for what, more in list(runs.items())[-1 if debug else 0 :]:
            samples = round(slower * place.wanted_s * 1.5) + 2 * place.part
            rate, use = job(place, name, [*options, *more], samples, kills=bool(more))
            tell("job", f"{what}: hours of audio an hour", rate * SEGMENT_S)
            for unit, share in use.items():
                tell("job", f"{what}: {unit} in use", share)
            tell("job", f"{what}: rate / the slower stage alone", rate / slower, "", None if more else 0.9)


def xlsr(out: Path) -> list[str]:
    """Options of teacher xlsr with random weights of XLS-R 2B up to block 10."""
    from teacher import LAYER, NORMS, SIZES
    from transformers import Wav2Vec2Config, Wav2Vec2Model

    from small_models import xlsr_head

    folder = out / "xlsr"
    if not (folder / "config.json").exists():
        with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
            model = Wav2Vec2Model(Wav2Vec2Config(**{**SIZES, **NORMS, "num_hidden_layers": LAYER}))
        model.cpu().save_pretrained(folder)
    head = xlsr_head(out / "head.pt", SIZES["hidden_size"])
    return ["--weights", str(folder), "--head", head, "--dtype", "bfloat16"]


def degrading(place: Place, processes: int) -> float:
    """Samples a second of so many processes that do nothing else."""
    with get_context("spawn").Pool(processes) as pool:
        return sum(pool.starmap(_degrading, [(place.clips, i, place.wanted_s) for i in range(processes)]))


def _degrading(clips: str, first: int, seconds: float) -> float:
    recipe = weights_free()
    work = Degrade(clips, recipe, SEED, "flac", False, libraries(recipe))
    work([{"id": 10_000_000 + first}])  # imports
    began, made = time.perf_counter(), 0
    while time.perf_counter() - began < seconds:
        made += len(work([{"id": first * 100_000 + made}]))
    return made / (time.perf_counter() - began)


def teaching(place: Place, name: str, options: list[str], batch: int) -> float:
    """Samples a second of a teacher whose next batches are decoded meanwhile, as in the job's actor."""
    recipe = weights_free()
    degrade = Degrade(place.clips, recipe, SEED, "flac", False, libraries(recipe))
    made: list[Any] = [
        {"id": i, **row} for i, row in enumerate(degrade([{"id": i} for i in range(16)])) if isinstance(row, dict)
    ]
    rows = (made * batch)[:batch]
    known = dict(zip(options[::2], options[1::2], strict=True))
    weights, head, dtype = known.get("--weights"), known.get("--head"), known.get("--dtype", "float32")
    sha256 = load_teacher(name, TeacherOptions(weights=weights, device="cpu", dtype=dtype, head=head)).weights_hash
    work = Teach(name, weights, head, dtype, batch * SEGMENT_S if place.device == "cuda" else None, sha256)
    work(rows)
    rounds, began = 0, time.perf_counter()
    with ThreadPoolExecutor(3) as threads:
        while time.perf_counter() - began < place.wanted_s:
            list(threads.map(work, [rows] * 3))
            rounds += 3
    return rounds * batch / (time.perf_counter() - began)


def job(
    place: Place, name: str, options: list[str], samples: int, kills: bool = False
) -> tuple[float, dict[str, float]]:
    """Samples a second between the first fifth of the parts and the last, and the mean use of CPUs and the GPU then.

    With `kills` a process of a teacher is killed on the way. Every sample must be there exactly once.
    """
    out = place.out / f"{name}-{'killed' if kills else 'whole'}-{time.time_ns()}"
    command = [sys.executable, str(ROOT / "jobs" / "pseudolabel.py"), "--clips", place.clips, "--seed", str(SEED)]
    command += ["--num-samples", str(samples), "--out", str(out), "--teacher", name, *options]
    command += ["--rows-per-part", str(place.part)]
    uses: list[tuple[float, float, float]] = []
    with Path(f"{out}.log").open("w+") as log, subprocess.Popen(command, stdout=log, stderr=log) as run:
        psutil.cpu_percent()
        pause, killed = threading.Event(), not kills
        while run.poll() is None:
            pause.wait(0.5)
            uses.append((time.time(), psutil.cpu_percent() / 100, _gpu_use()))
            parts = len(list((out / "shards").glob("part-*"))) if (out / "shards").exists() else 0
            if not killed and parts > samples // place.part // 3:
                killed = _kill_a_teacher(run.pid)
        if run.returncode:
            log.seek(0)
            raise SystemExit(log.read()[-2000:])
    assert killed, "no teacher was found to kill"
    files = sorted((out / "shards").glob("part-*"), key=lambda file: file.stat().st_mtime)
    ids = sorted(pq.read_table(out / "shards", columns=["sample_id"])["sample_id"].to_pylist())
    rejected = pq.read_table(out / "rejects" / "rejects.parquet").num_rows
    assert len(ids) == len(set(ids)) == samples - rejected, "a sample is missing, or is there twice"
    times, counts = [f.stat().st_mtime for f in files], np.cumsum([pq.read_metadata(f).num_rows for f in files])
    steady = len(files) // 5
    rate = (counts[-1] - counts[steady]) / max(1e-9, times[-1] - times[steady])
    during = [use for use in uses if times[steady] <= use[0] <= times[-1]] or uses[-1:]
    return float(rate), {"CPUs": mean(use[1] for use in during), "GPU": mean(use[2] for use in during)}


def _gpu_use() -> float:
    from speechdistill.engine.cluster import node_use

    return max(node_use()[1], default=0.0)


def _kill_a_teacher(driver: int) -> bool:
    """Kill the largest child process of an actor: that of a teacher, which has torch and its weights."""
    children = []
    for process in psutil.process_iter(["cmdline", "memory_info"]):
        with suppress(psutil.Error):
            if "isolate" in " ".join(process.info["cmdline"] or ()):
                children.append((process.info["memory_info"].rss, process.pid))
    if children:
        os.kill(max(children)[1], signal.SIGKILL)
    return bool(children)


def _run(command: list[str]) -> None:
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)

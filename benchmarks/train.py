"""What the training job costs beside the training: steps per second against a bare loop over tensors in memory."""

import os
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import ray
import tyro
from bare import WARM_UP, steps_per_s

from speechdistill.engine import cluster, shards
from speechdistill.io import audio
from speechdistill.labelling.samples import DEGRADED, TAUGHT
from speechdistill.training.batches import Mix
from speechdistill.training.progress import Progress
from speechdistill.training.ray_train import Job, fit
from speechdistill.training.recipe import Training
from speechdistill.training.recipes.distill import Distill, student

SAMPLES = 400


@dataclass(frozen=True)
class Options:
    """Steps per second of one worker, in the job and in a bare loop, on the same threads; each in its turn."""

    variants: tuple[str, ...] = ("v0", "v7")
    """Students."""
    steps: tuple[int, ...] = (30, 8)
    """Steps of each, after five to warm up."""
    crop_s: float = 1.92
    """Seconds of each sample."""
    cpus: int = max(1, (os.cpu_count() or 1) - 1)
    """Threads. Default: all cores but one, which Ray's own processes need."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where the worker computes."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Arithmetic."""


def main(options: Options) -> None:
    cluster.connect()
    print(f"\nSteps per second, batch 20, crops of {options.crop_s:g} s, {options.cpus} threads (target: 0.9)\n")
    print("| student | bare loop | job | ratio |\n|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        labels_of = labels(Path(folder) / "labels")
        for name, steps in zip(options.variants, options.steps, strict=True):
            bare = [_bare(name, steps, options)]
            job = job_rate(name, steps, options, labels_of, Path(folder) / name)
            bare.append(_bare(name, steps, options))
            rate = float(np.mean(bare))
            print(f"| {name} | {rate:.3f} | {job:.3f} | {job / rate:.2f} |", flush=True)


def _bare(name: str, steps: int, options: Options) -> float:
    samples = round(options.crop_s * audio.SAMPLE_RATE)
    with ProcessPoolExecutor(1, get_context("spawn")) as fresh:
        return fresh.submit(steps_per_s, name, steps, samples, options.device, options.dtype, options.cpus).result()


def job_rate(name: str, steps: int, options: Options, labels: str, out: Path) -> float:
    """Steps a second of a worker of Ray Train."""
    cluster.connect()
    recipe = Distill(student=student(name), mix=Mix(shards=(labels,), labeled_percent=0, crop_s=options.crop_s))
    training = Training(steps=WARM_UP + steps, validate_every=10**6, dtype=options.dtype)
    gpus = float(options.device == "cuda")
    progress, seen = Progress(1), []
    going = ray.remote(num_cpus=0)(fit).remote(
        Job(make=recipe.make, training=training, out=str(out), identity={}, cpus=float(options.cpus), gpus=gpus),
        progress,
    )
    while not ray.wait([going], timeout=0.2)[0]:
        seen.append((time.perf_counter(), progress.read().step))
    ray.get(going)
    # The first sight of each step; the last one comes after the validation.
    firsts = [(at, step) for (at, step), (_, before) in zip(seen[1:], seen, strict=False) if step > before]
    times, steps_seen = np.array([pair for pair in firsts if WARM_UP <= pair[1] < training.steps]).T
    return float(np.polyfit(times, steps_seen, 1)[0])


def labels(out: Path) -> str:
    """A finished label run of noise: what is in the waves costs nothing more or less."""
    layout = shards.Layout(
        out=str(out),
        schema="pseudolabel.v1",
        id_column="sample_id",
        num_ids=SAMPLES,
        rows_per_part=64,
        totals=lambda rows: {},
    )
    shards.claim(layout.out, {})
    rng = np.random.default_rng(0)
    for k in range(layout.num_parts):
        rows = [_row(i, rng) for i in layout.ids(k)]
        schema = pa.schema([("id", pa.int64()), *DEGRADED, *TAUGHT, *shards.REJECT])
        shards.write_parts(pa.Table.from_pylist(rows, schema), layout)
    shards.finish(layout)
    shards.complete(str(out), {})
    return str(out)


def _row(sample_id: int, rng: np.random.Generator) -> dict[str, object]:
    pcm = rng.normal(0, 1000, 122_880).astype(np.int16)
    return {
        "id": sample_id,
        "audio": audio.encode(pcm, "flac"),
        "audio_format": "flac",
        "sample_rate": audio.SAMPLE_RATE,
        "num_samples": len(pcm),
        "plan": "{}",
        "clip_ids": [],
        "segment_start_s": 0.0,
        "segment_duration_s": 7.68,
        "score": float(rng.uniform(1, 5)),
        "logit": 0.0,
        "teacher": "noise",
        "teacher_hash": "0",
    }


if __name__ == "__main__":
    main(tyro.cli(Options))

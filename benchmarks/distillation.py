"""What distillation is worth: v0 distilled from 2,000 samples against v0 trained on those of a twentieth of the clips.

The labels are the same, those of the released v7 on real speech that was degraded; the speakers of training,
validation and test are disjoint, and each has one clip. Both students make equal steps, the last quarter of them at a
fifth of the learning rate, and are chosen by the same validation samples; a fifth of each batch of the distilled one
are the other's samples. The figure is the share of the way from the labeled-only student to the teacher, (distilled -
labeled-only) / (1 - labeled-only), in PCC with the teacher on the test speakers (bar: 0.5).
"""

import csv
import hashlib
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow.parquet as pq
import ray
import soundfile
import torch
import tyro

from speechdistill import cli
from speechdistill.data import scored_clips
from speechdistill.engine.finished_run import LabelRun
from speechdistill.engine.held_out import HeldOut
from speechdistill.io import audio, fingerprint, storage, table
from speechdistill.metrics import correlation
from speechdistill.models import student_scorer
from speechdistill.models.label import Label
from speechdistill.models.student import load_student
from speechdistill.training.batches import Mix
from speechdistill.training.loop import Loop
from speechdistill.training.recipe import Training
from speechdistill.training.recipes.distill import Distill, student

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
SPEAKERS = {"train": 0.7, "validation": 0.1, "test": 0.2}
SAMPLES = {"train": 2_000, "validation": 64, "test": 300}
LABELED = 0.05  # of the training clips
VALIDATE_EVERY = 100  # steps
ARMS = {"distilled": 20.0, "labeled-only": 100.0}  # percent of labeled clips in a batch


@dataclass(frozen=True)
class Options:
    """Distilled against labeled-only, one process each; an hour on two cores. The same command goes on, elsewhere too
    when the files OUT/*/pcc-*.json were copied there."""

    out: str = "distillation-out"
    """Where everything goes."""
    data: str = str(SHARED)
    """Folder with speech/ (one file a speaker), noise/ and rir/."""
    seeds: int = 3
    """Trainings of each kind."""
    steps: int = 900
    """Updates."""
    learning_rate: float = 1e-3
    """The paper's 2e-5 is for 250,000 steps."""
    crop_s: float = 0.96
    """Seconds of each sample in a batch."""
    samples: int = SAMPLES["train"]
    """Labelled for training; for validation and test as many, at most 64 and 300."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Device that trains the students."""


def main(options: Options) -> None:
    if not Path(options.data, "speech").is_dir():
        sys.exit(f"{options.data} has no folder speech; give --data DIR with speech/, noise/ and rir/")
    out = Path(options.out)
    counts = {split: min(most, options.samples) for split, most in SAMPLES.items()} | {"train": options.samples}
    runs = {split: label_run(split, Path(options.data), out, count) for split, count in counts.items()}
    ray.shutdown()
    scored = _labeled(runs, out)
    jobs = [(seed, arm) for seed in range(options.seeds) for arm in ARMS]
    with ProcessPoolExecutor(len(ARMS), get_context("spawn")) as processes:
        trained = {job: processes.submit(_train, *job, scored, options) for job in jobs}
        pccs = {job: future.result() for job, future in trained.items()}
    _print(np.array([[pccs[seed, arm] for arm in ARMS] for seed in range(options.seeds)]), options)


def _train(seed: int, arm: str, scored: str, options: Options) -> float:
    """PCC with the teacher on the test samples, of the student with the least error on the validation samples."""
    torch.set_num_threads(1)
    out = Path(options.out).resolve() / f"{arm}-{seed}"
    decides = [options.steps, options.learning_rate, options.crop_s, options.samples]
    result = out / f"pcc-{fingerprint.of(decides)[:8]}.json"
    if known := storage.read_json(str(result)):
        return float(known["pcc"])
    mix = Mix(shards=(f"{options.out}/train",), labeled_percent=ARMS[arm], crop_s=options.crop_s, seed=seed)
    first, last = options.steps * 3 // 4, options.steps // 4
    all_of_it = (HeldOut(),)  # other runs, of other speakers, validate and judge
    recipe = Distill(student=student("v0"), mix=mix, labeled=scored, held_out=all_of_it)
    _phase(recipe, first, options.learning_rate, out / "first", options.device)
    _phase(
        replace(recipe, mix=replace(mix, seed=seed + 1_000), init=f"{out}/first"),
        last,
        options.learning_rate / 5,
        out / "last",
        options.device,
    )
    scorer = student_scorer.scorer(load_student(f"{out}/last").network, "v0", "")
    rows = samples(LabelRun(f"{options.out}/test"))
    labels = scorer.label([audio.decode(row["audio"], row["audio_format"]) for row in rows])
    teacher = np.array([row["score"] for row in rows])
    pcc = correlation.pcc(teacher, np.array([label.score for label in labels if isinstance(label, Label)]))
    storage.publish_json({"pcc": pcc}, str(result))
    print(f"{arm} {seed}: PCC {pcc:.4f} on {len(rows)} test samples", flush=True)
    return pcc or 0.0


def _phase(recipe: Distill, steps: int, learning_rate: float, folder: Path, device: str) -> None:
    """Train, and keep the best student in `folder`."""
    loop = Loop(recipe.make(), Training(steps=steps, learning_rate=learning_rate, dtype="bfloat16"), device=device)
    start = time.monotonic()
    for step, _, _ in loop.run(steps):
        if step % VALIDATE_EVERY == 0 or step == steps:
            figures = loop.validate()
            if figures["is_best"]:
                loop.save(str(folder))
            left_min = (time.monotonic() - start) / step * (steps - step) / 60
            text = f"MSE {figures['mse']:.3f}, PCC {figures['pcc']:.3f} in validation, {left_min:.0f} min left"
            print(f"{folder.parent.name} {folder.name} {step}/{steps}: {text}", flush=True)


def label_run(split: str, data: Path, out: Path, count: int) -> LabelRun:
    """A label run of this split's speakers, with all noise and rooms."""
    speech = sorted((data / "speech").iterdir(), key=lambda path: hashlib.sha256(path.name.encode()).digest())
    ends = np.round(np.cumsum([0, *SPEAKERS.values()]) * len(speech)).astype(int)
    which = list(SPEAKERS).index(split)
    listing = out / f"{split}.csv"
    listing.parent.mkdir(parents=True, exist_ok=True)
    with listing.open("w", newline="") as file:
        lines = csv.writer(file)
        lines.writerow(["path", "kind"])
        lines.writerows([path.resolve(), "speech"] for path in speech[ends[which] : ends[which + 1]])
        lines.writerows([path.resolve(), kind] for kind in ("noise", "rir") for path in sorted((data / kind).iterdir()))
    _step("ingest", "--list", str(listing), "--out", f"{out}/{split}-clips")
    wanted = ["--num-samples", str(count), "--seed", str(which)]
    _step("pseudolabel", "--clips", f"{out}/{split}-clips/clips.parquet", *wanted, "--out", f"{out}/{split}")
    return LabelRun(f"{out}/{split}")


def _step(*arguments: str) -> None:
    if code := cli.main(arguments):
        sys.exit(code)


def samples(run: LabelRun) -> list[dict[str, Any]]:
    columns = ["sample_id", "clip_ids", "audio", "audio_format", "score"]
    return pq.read_table(f"{run.out}/shards", columns=columns).to_pylist()


def _labeled(runs: dict[str, LabelRun], out: Path) -> str:
    """The training samples of a random twentieth of the clips, and all of validation, as files with their scores."""
    train = samples(runs["train"])
    clips = sorted({row["clip_ids"][0] for row in train})
    chosen = set(np.random.default_rng(0).permutation(clips)[: round(LABELED * len(clips))])
    rows = [("train", row) for row in train if row["clip_ids"][0] in chosen]
    print(f"labeled: {len(rows)} samples of {len(chosen)} of {len(clips)} clips")
    rows += [("validation", row) for row in samples(runs["validation"])]
    folder = out / "labeled"
    folder.mkdir(exist_ok=True)
    with (folder / "scores.csv").open("w", newline="") as file:
        lines = csv.writer(file)
        lines.writerow(["path", "mos", "split"])
        for split, row in rows:
            name = f"{split}-{row['sample_id']}.wav"
            soundfile.write(folder / name, audio.decode(row["audio"], row["audio_format"]), audio.SAMPLE_RATE)
            lines.writerow([name, row["score"], split])
    storage.publish(table.parquet_bytes(scored_clips.manifest(f"{folder}/scores.csv")), f"{folder}/clips.parquet")
    return f"{folder}/clips.parquet"


def _print(pccs: np.ndarray, options: Options) -> None:
    distilled, labeled_only = pccs.T
    shares = (distilled - labeled_only) / (1 - labeled_only)
    storage.publish_json({"share": shares.tolist()}, f"{options.out}/share.json")
    print(f"\nv0, {options.steps} steps, crops of {options.crop_s:g} s; PCC with v7 on new speakers")
    print("\n| seed | distilled | labeled-only | share of the way |\n|---|---|---|---|")
    for seed, values in enumerate(zip(distilled, labeled_only, shares, strict=True)):
        print(f"| {seed} | {' | '.join(f'{value:.3f}' for value in values)} |")
    if len(pccs) > 1:
        spread = [f"{values.mean():.3f} ± {values.std(ddof=1):.3f}" for values in (distilled, labeled_only, shares)]
        print(f"| mean ± sd | {' | '.join(spread)} |")


if __name__ == "__main__":
    main(tyro.cli(Options))

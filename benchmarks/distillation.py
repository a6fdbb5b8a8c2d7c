"""What distillation is worth: v0 distilled from 2,000 samples against v0 trained on those of a twentieth of the clips.

The labels are the same, those of the released v7 on real speech that was degraded; the speakers of training,
validation and test are disjoint, and each has one clip. Both students make equal steps and are chosen by the same
validation samples; a fifth of each batch of the distilled one are the other's samples. The figure is the share of the
way from the labeled-only student to the teacher, (distilled - labeled-only) / (1 - labeled-only), in PCC with the
teacher on the test speakers (bar: 0.5).
"""

import csv
import hashlib
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import soundfile
import tyro

from speechdistill import audio, cli, evaluate, student_files, train_students
from speechdistill.batches import LabelRun
from speechdistill.scorer import Scorer
from speechdistill.train_students import TrainStudents

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
SPEAKERS = {"train": 0.7, "validation": 0.1, "test": 0.2}
SAMPLES = {"train": 2_000, "validation": 64, "test": 300}
LABELED = 0.05  # of the training clips
ARMS = {"distilled": 20.0, "labeled-only": 100.0}  # percent of labeled clips in a batch


@dataclass(frozen=True)
class Options:
    """Distilled against labeled-only, on as many seeds; an hour on two cores. The same command goes on."""

    out: str = "distillation-out"
    """Where everything goes."""
    data: str = str(SHARED)
    """Folder with speech/ (one file a speaker), noise/ and rir/."""
    seeds: int = 3
    """Trainings of each kind."""
    steps: int = 450
    """Updates."""
    learning_rate: float = 1e-3
    """The paper's 2e-5 is for 250,000 steps."""
    crop_s: float = 1.92
    """Seconds of each sample in a batch."""


def main(options: Options) -> None:
    out = Path(options.out)
    runs = {split: _labels(split, Path(options.data), out) for split in SAMPLES}
    labeled = _labeled(runs, out)
    test = _rows(runs["test"])
    waves = [audio.decode(row["audio"], row["audio_format"]) for row in test]
    teacher = np.array([row["score"] for row in test])
    rows = []
    for seed in range(options.seeds):
        trained = train_students.run(
            TrainStudents(
                out=f"{out}/students-{seed}",
                shards=(str(out / "train"),),
                labeled=labeled,
                variants="v0",
                labeled_percent=tuple(ARMS.values()),
                steps=options.steps,
                learning_rate=options.learning_rate,
                crop_s=options.crop_s,
                validate_every=75,
                dtype="bfloat16",
                seed=seed,
            )
        )
        if any(row["state"] != "done" for row in trained):
            sys.exit(1)
        rows.append([_pcc(row["folder"], waves, teacher) for row in trained])
        print(f"seed {seed}: " + ", ".join(f"{name} {pcc:.4f}" for name, pcc in zip(ARMS, rows[-1], strict=True)))
    _print(np.array(rows), options, len(test))


def _labels(split: str, data: Path, out: Path) -> LabelRun:
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
    wanted = ["--num-samples", str(SAMPLES[split]), "--seed", str(which)]
    _step("pseudolabel", "--clips", f"{out}/{split}-clips/clips.parquet", *wanted, "--out", f"{out}/{split}")
    return LabelRun(f"{out}/{split}")


def _step(*arguments: str) -> None:
    if code := cli.main(arguments):
        sys.exit(code)


def _rows(run: LabelRun) -> list[dict[str, Any]]:
    columns = ["sample_id", "clip_ids", "audio", "audio_format", "score"]
    return pq.read_table(f"{run.out}/shards", columns=columns).to_pylist()


def _labeled(runs: dict[str, LabelRun], out: Path) -> str:
    """The training samples of a random twentieth of the clips, and all of validation, as files with their scores."""
    train = _rows(runs["train"])
    clips = sorted({row["clip_ids"][0] for row in train})
    chosen = set(np.random.default_rng(0).permutation(clips)[: round(LABELED * len(clips))])
    rows = [("train", row) for row in train if row["clip_ids"][0] in chosen]
    print(f"labeled: {len(rows)} samples of {len(chosen)} of {len(clips)} clips")
    rows += [("validation", row) for row in _rows(runs["validation"])]
    folder = out / "labeled"
    folder.mkdir(exist_ok=True)
    with (folder / "scores.csv").open("w", newline="") as file:
        lines = csv.writer(file)
        lines.writerow(["path", "mos", "split"])
        for split, row in rows:
            name = f"{split}-{row['sample_id']}.wav"
            soundfile.write(folder / name, audio.decode(row["audio"], row["audio_format"]), audio.SAMPLE_RATE)
            lines.writerow([name, row["score"], split])
    return f"{folder}/scores.csv"


def _pcc(folder: str, waves: list[np.ndarray], teacher: np.ndarray) -> float:
    student = student_files.load(folder)
    scorer = Scorer(student.network, "v0", student.weights_hash)
    scores = [scorer.label([wave])[0].score for wave in waves]
    return evaluate.pcc(teacher, np.array(scores)) or 0.0


def _print(pccs: np.ndarray, options: Options, num_test: int) -> None:
    distilled, labeled_only = pccs.T
    shares = (distilled - labeled_only) / (1 - labeled_only)
    print(
        f"\nv0, {options.steps} steps, crops of {options.crop_s:g} s; PCC with v7 on {num_test} samples of new speakers"
    )
    print("\n| seed | distilled | labeled-only | share of the way |\n|---|---|---|---|")
    for seed, values in enumerate(zip(distilled, labeled_only, shares, strict=True)):
        print(f"| {seed} | {' | '.join(f'{value:.3f}' for value in values)} |")
    spread = [f"{values.mean():.3f} ± {values.std(ddof=1):.3f}" for values in (distilled, labeled_only, shares)]
    print(f"| mean ± sd | {' | '.join(spread)} |")


if __name__ == "__main__":
    main(tyro.cli(Options))

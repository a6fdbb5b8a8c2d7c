#!/usr/bin/env python3
"""The whole main job on this machine: a corpus, its manifest, 200 labelled samples, scores; see `--help`."""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "platform"))

import pyarrow.parquet as pq
import soundfile
import tyro

from speechdistill import audio, cli, table
from speechdistill.plan import Plan
from speechdistill.pseudolabel import make_sample


@dataclass(frozen=True)
class Demo:
    """Label speech end to end with local Ray and the released Distill-MOS weights, and look at the result.

    Without --speech a small corpus in five languages is synthesised first.
    """

    out: str = "demo-out"
    """Where everything goes."""
    speech: tuple[str, ...] = ()
    """Your own folders of speech."""
    noise: tuple[str, ...] = ()
    """Your own folders of noise; coloured noise and babble without."""
    rir: tuple[str, ...] = ()
    """Your own folders of room impulse responses; simulated rooms without."""
    num_samples: int = 200
    """Samples to label."""


def main(demo: Demo) -> int:
    given = (demo.speech, demo.noise, demo.rir)
    # Other recordings are another run, in a folder of its own.
    out = Path(demo.out) / (f"own-{table.fingerprint(given)[:8]}" if any(given) else "synthetic")
    manifest, run = out / "manifest", out / "pseudolabels"
    sources = _own(demo) if demo.speech else _synthetic(out / "corpus")
    if not demo.speech and any(given):
        print("error: give --speech DIR (make demo SPEECH=DIR) with --noise and --rir", file=sys.stderr)
        return 2
    labelling = [
        "--clips",
        f"{manifest}/clips.parquet",
        "--num-samples",
        str(demo.num_samples),
        "--seed",
        "1",
    ]
    for command in (
        ["ingest", *sources, "--out", str(manifest)],
        ["pseudolabel", *labelling, "--rows-per-part", "16", "--out", str(run)],
    ):
        if code := _step(command):
            return code
    degraded = _listen(run, out)
    scores = out / "scores.json"
    if code := _step(["score", str(out / "clean.wav"), str(out / "degraded.wav"), "--out", str(scores)]):
        return code
    clean_mos, degraded_mos = (row["mos"] for row in table.read_json(str(scores)))
    print(f"clean {clean_mos:.2f} MOS, degraded {degraded_mos:.2f} MOS")
    print(f"(sample {degraded.sample_id}: {', '.join(map(str, degraded.steps))})")
    _next(out, manifest, run)
    return 0


def _own(demo: Demo) -> list[str]:
    kinds = (("--speech", demo.speech), ("--noise", demo.noise), ("--rir", demo.rir))
    return [word for flag, folders in kinds if folders for word in (flag, *folders)]


def _synthetic(root: Path) -> list[str]:
    from speechdistill.corpora import espeak

    print(f"synthesising speech in five languages, noise and rooms below {root}", flush=True)
    return ["--list", str(espeak.write(root, num_clips=60))]


def _step(arguments: list[str]) -> int:
    print(f"\n$ speechdistill {' '.join(arguments)}", flush=True)
    return cli.main(arguments)


def _listen(run: Path, out: Path) -> Plan:
    """Write the worst sample and its clean segment as `degraded.wav` and `clean.wav`, made again from its plan."""
    rows = pq.read_table(run / "shards", columns=["score", "plan"]).sort_by("score")
    worst = Plan.from_json(rows["plan"][0].as_py())
    for name, wave in zip(("degraded", "clean"), make_sample(worst), strict=True):
        soundfile.write(out / f"{name}.wav", wave, audio.SAMPLE_RATE)
    return worst


def _next(out: Path, manifest: Path, run: Path) -> None:
    print(f"""
Results are below {out}:
  pseudolabels/shards/*.parquet  audio, score, logit and the full plan of every sample
  pseudolabels/summary.json      counts, hours, histogram, throughput
  clean.wav, degraded.wav        the worst sample, before and after
What to type next (after `source .venv/bin/activate`):
  speechdistill score YOUR_RECORDINGS --out scores.csv
  speechdistill pseudolabel --clips {manifest}/clips.parquet --recipe as_is --out {out}/as-is
  mlflow ui --backend-store-uri sqlite:///{run}/mlflow.db
  ray job submit --working-dir . -- python jobs/pseudolabel.py --help      (on a cluster)""")


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Demo)))

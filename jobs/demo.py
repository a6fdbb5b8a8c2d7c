#!/usr/bin/env python3
"""The whole main job on this machine: a corpus, its manifest, 200 labelled samples, scores; see `--help`."""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "platform"))

import pyarrow.parquet as pq
import soundfile
import tyro

from speechdistill import __version__, audio, cli, degradations, table
from speechdistill.plan import Plan
from speechdistill.samples import make_sample


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
    own = _own(demo)
    if own and not demo.speech:
        print("error: --noise and --rir need --speech DIR beside them (make demo SPEECH=DIR)", file=sys.stderr)
        return 2
    # Other recordings, or other library versions, are another run, in a folder of its own.
    out = Path(demo.out) / (f"own-{table.fingerprint(own)[:8]}" if own else "synthetic")
    if code := _step(["ingest", *(own or _synthetic(out / "corpus")), "--out", f"{out}/manifest"]):
        return code
    clips = f"{out}/manifest/clips.parquet"
    versions = {**audio.codec_versions(), **degradations.library_versions()}
    run = out / f"pseudolabels-{table.fingerprint([table.file_hash(clips), versions, __version__])[:8]}"
    number, labels = str(demo.num_samples), ["--seed", "1", "--rows-per-part", "16", "--out", str(run)]
    if code := _step(["pseudolabel", "--clips", clips, "--num-samples", number, *labels]):
        return code
    sample = _listen(run, out)
    if code := _step(["score", f"{out}/clean.wav", f"{out}/degraded.wav", "--out", f"{out}/scores.json"]):
        return code
    clean, degraded = (row["mos"] for row in table.read_json(f"{out}/scores.json"))
    print(f"clean {clean:.2f} MOS, degraded {degraded:.2f} MOS, by")
    print("\n".join(f"  {step}" for step in sample.steps))
    _next(out, clips, run)
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
    """Write the worst degraded sample and its clean segment as files, made again from its plan alone."""
    rows = pq.read_table(run / "shards", columns=["score", "plan"]).sort_by("score")
    plans = [Plan.from_json(text) for text in rows["plan"].to_pylist()]
    worst = next((plan for plan in plans if plan.steps), plans[0])
    for name, wave in zip(("degraded", "clean"), make_sample(worst), strict=True):
        soundfile.write(out / f"{name}.wav", wave, audio.SAMPLE_RATE)
    return worst


def _next(out: Path, clips: str, run: Path) -> None:
    print(f"""
Results are below {out}:
  {run.name}/shards/*.parquet  audio, score, logit and the full plan of every sample
  {run.name}/summary.json      counts, hours, histogram, throughput
  clean.wav, degraded.wav                 the worst sample, before and after
What to type next (after `source .venv/bin/activate`):
  speechdistill score YOUR_RECORDINGS --out scores.csv
  speechdistill pseudolabel --clips {clips} --recipe as_is --out {out}/as-is
  mlflow ui --backend-store-uri sqlite:///{run.resolve()}/mlflow.db
  ray job submit --working-dir . -- python jobs/pseudolabel.py --help      (on a cluster)""")


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Demo)))

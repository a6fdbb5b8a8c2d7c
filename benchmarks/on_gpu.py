"""The sections of `on_gpu.sh`, each a process of its own."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Literal

import tyro
from figures import tell

ROOT = Path(__file__).resolve().parents[1]
OUT = Path(os.environ.get("OUT", "on_gpu-out"))
AUDIO = Path(os.environ.get("AUDIO", ROOT.parent / "shared" / "data"))
SEGMENT_S, HOURS = 7.68, 2_600


@dataclass(frozen=True)
class Options:
    """One section; `on_gpu.sh --help` tells more."""

    what: tyro.conf.Positional[Literal["correct", "teacher", "job", "train", "prune", "science", "ended", "table"]]
    """Section, or what comes after it."""
    device: Literal["cuda", "cpu"] = "cuda"
    """Device of the networks."""
    debug: bool = False
    """Small sizes."""
    section: str = ""
    """The section that `ended`."""
    seconds: float = 0.0
    """The time that it took."""
    why: str = ""
    """The reason why it failed."""


def main(options: Options) -> int:
    if options.what == "ended":
        tell(options.section, "the section", f"failed: {options.why}" if options.why else "whole")
        tell(options.section, "its time", options.seconds, "s")
    elif options.what == "table":
        import figures

        print(f"\n{where()}\n\n{figures.table()}")
    else:
        import torch

        if options.device == "cuda" and not torch.cuda.is_available():
            print("no GPU here; --device cpu --debug runs the same code")
            return 1
        return SECTIONS[options.what](options) or 0
    return 0


def where() -> str:
    """The card, or CPU, the versions and the commit."""
    import torch

    card = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    git = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip() or "unknown commit"
    return f"{card}, {os.cpu_count()} cores, torch {torch.__version__}, {commit}"


def correct(options: Options) -> int:
    import pytest

    class Counts:
        def __init__(self) -> None:
            self.of: dict[str, int] = {}

        def pytest_runtest_logreport(self, report: Any) -> None:
            if report.when == "call" or report.outcome != "passed":
                self.of[report.outcome] = self.of.get(report.outcome, 0) + 1
            if not report.passed:
                why = f": {report.longrepr[2]}" if report.skipped else ""
                tell("correct", report.nodeid.rpartition("::")[2], f"{report.outcome}{why}")

    os.environ["SPEECHDISTILL_GPU"] = options.device
    counts = Counts()
    code = pytest.main(
        ["-q", "-m", "gpu", "--durations=5", "-p", "no:cacheprovider", str(ROOT / "tests" / "test_gpu.py")], [counts]
    )
    bars = {"passed": ("", 1), "skipped": (), "failed": ("", 0, True)}  # none passes where the file cannot be read
    for outcome, bar in bars.items():
        tell("correct", f"tests {outcome}", counts.of.get(outcome, 0), *bar)
    return int(code)


def teacher(options: Options) -> None:
    """XLS-R 2B to its tenth block, random weights: seconds of audio a second, by batch, and with torch.compile."""
    import numpy as np
    import torch
    from bare import ceiling
    from teacher import LAYER, encoder, timed
    from torch.utils.flop_counter import FlopCounterMode

    most = ceiling(options.device, *((256, 2) if options.debug else ()))
    tell("teacher", "matrix product in bfloat16", most / 1e12, "TFLOP/s")
    model = encoder(1 if options.debug else LAYER, options.device, getattr(torch, _dtype(options)))
    seconds_of = 1.0 if options.debug else SEGMENT_S
    best = 0.0, 0.0  # seconds of audio a second, share
    for compiles in (False, True):
        if compiles and options.debug:
            break
        for block in model.model.encoder.layers if compiles else ():
            block.compile(dynamic=True)
        sizes = (2,) if options.debug else (32, 64) if compiles else (8, 32, 64, 128)
        for batch in sizes:
            if options.device == "cuda":
                torch.cuda.reset_peak_memory_stats()
            rng = np.random.default_rng(0)
            waves = [rng.standard_normal(round(seconds_of * 16_000)).astype(np.float32) for _ in range(batch)]
            inputs = model.prepared(waves)
            with torch.inference_mode():
                with FlopCounterMode(display=False) as counter:
                    model(*inputs)
                seconds = timed(lambda inputs=inputs: model(*inputs), 1 if options.debug else 10, wait(options))
            audio_s, share = batch * seconds_of / seconds, counter.get_total_flops() / seconds / most
            name = f"batch of {batch}{', compiled' if compiles else ''}"
            tell("teacher", name, audio_s, "s of audio a second")
            tell("teacher", f"{name}: share of the matrix product", share)
            if options.device == "cuda":
                tell("teacher", f"{name}: memory", torch.cuda.max_memory_allocated() / 2**30, "GiB")
            best = max(best, (audio_s, share))
    tell("teacher", "share of the matrix product, best batch", best[1], "", 0.4)
    tell("teacher", f"{HOURS:,} h of audio", HOURS / best[0], "h", 1.0, True)


def _dtype(options: Options) -> Literal["float32", "bfloat16"]:
    return "bfloat16" if options.device == "cuda" else "float32"  # which many CPUs have not


def wait(options: Options) -> Callable[[], object]:
    import torch

    return torch.cuda.synchronize if options.device == "cuda" else lambda: None


def train(options: Options) -> None:
    """Ten students bare, and two of them through Ray Train."""
    import tempfile

    import torch
    import train as job
    from bare import BATCH, PAPER_STEPS, VARIANTS, ceiling, flop, steps_per_s

    crop = 7_680 if options.debug else 122_880
    most = ceiling(options.device, *((256, 2) if options.debug else ()))
    threads = torch.get_num_threads()
    rates = {}
    for name in ("v0",) if options.debug else VARIANTS:
        steps = 2 if options.debug else 12
        rates[name] = steps_per_s(name, steps, crop, options.device, _dtype(options), threads)
        share = rates[name] * flop(name, crop, options.device) / most
        tell("train", f"{name} bare", BATCH * rates[name], "samples/s")
        tell("train", f"{name} bare: share of the matrix product", share)
    hours = sum(PAPER_STEPS / rate / 3600 for rate in rates.values())
    tell("train", f"{PAPER_STEPS:,} steps of {len(rates)} students, one after another", hours, "h", 8.0, True)
    if not options.debug:
        compiled = steps_per_s("v7", 20, crop, options.device, _dtype(options), threads, compiles=True)
        tell("train", "v7 compiled / not", compiled / rates["v7"])
    with tempfile.TemporaryDirectory() as folder:
        labels = job.labels(Path(folder) / "labels")
        for name, steps in (("v0", 4),) if options.debug else (("v0", 150), ("v7", 80)):
            how = job.Options((name,), (steps,), crop / 16_000, 1, options.device, _dtype(options))
            rate = job.job_rate(name, steps, how, labels, Path(folder) / name)
            tell("train", f"{name} through Ray Train / bare", rate / rates[name], "", 0.95)


def prune(options: Options) -> None:
    """Half of XLS-R 2B to block 10, the threshold, and the memory of an update of importance."""
    import prune as costs
    import torch

    small = {"hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 128}
    sizes, repeats, seconds = (small, 1, 0.5) if options.debug else (costs.XLSR_2B, 20, SEGMENT_S)
    whole, slim = costs.speeds(sizes, options.device, repeats, seconds)
    tell("prune", "half of heads and neurons: time / whole", slim / whole, "", 0.6, True)
    count = 1_000_000 if options.debug else 477_000_000
    scores = torch.randn(count, device=options.device).square_()
    gone = [torch.zeros(count, dtype=torch.bool, device=options.device)]
    wait(options)()
    began = time.perf_counter()
    costs.remove_lowest([scores], gone, count // 200)
    wait(options)()
    tell("prune", f"exact threshold among {count:,} scores", time.perf_counter() - began, "s")
    del scores, gone
    if options.device == "cuda":
        peaks = [costs.gpu_peak(sizes, updates, 8, SEGMENT_S) for updates in ("plain", "pruning")]
        tell("prune", "memory of an importance update / plain", peaks[1] / peaks[0])


def science(options: Options) -> None:
    """Resumable: the same call goes on; what a student reached is in OUT/science/ARM-SEED/pcc-*.json."""
    more = ["--steps", "4", "--seeds", "1", "--samples", "24", "--crop-s", "0.96"]
    if not options.debug:
        more = ["--steps", "20000", "--samples", "10000", "--crop-s", str(SEGMENT_S)]
    places = ["--data", str(AUDIO), "--out", str(OUT / "science"), "--device", options.device]
    run = subprocess.run([sys.executable, str(ROOT / "benchmarks" / "distillation.py"), *places, *more], check=False)
    for file in sorted((OUT / "science").glob("*/pcc-*.json")):
        tell("science", f"PCC of {file.parent.name}", json.loads(file.read_text())["pcc"])
    if run.returncode:
        raise SystemExit(run.returncode)
    share = json.loads((OUT / "science" / "share.json").read_text())["share"]
    tell("science", "share of the way from labeled-only to the teacher", median(share), "", 0.5)


def job(options: Options) -> None:
    import gpu_job

    gpu_job.measure(AUDIO, OUT / "job", options.device, options.debug)


SECTIONS: dict[str, Callable[[Options], int | None]] = {
    "correct": correct,
    "teacher": teacher,
    "job": job,
    "train": train,
    "prune": prune,
    "science": science,
}

if __name__ == "__main__":
    sys.exit(main(tyro.cli(Options)))

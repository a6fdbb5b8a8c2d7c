"""Peak memory and speed of scoring long recordings with the real weights: `benchmarks/memory.py [MINUTES ...]`.

Prints the peak of each length (default 5 and 15 minutes) and the ratio of the longest to the shortest, which
streaming keeps near 1. Each length runs in its own process.
"""

import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import soundfile

from speechdistill.io import audio

GIB = 1 << 30


def main(minutes: list[int]) -> None:
    peaks = {}
    for length in minutes:
        with tempfile.TemporaryDirectory() as folder:
            path = str(Path(folder) / "long.flac")
            make(path, length)
            run = subprocess.run([sys.executable, __file__, "--file", path], stdout=subprocess.PIPE, check=True)
        peak, anonymous, seconds = map(float, run.stdout.split())
        peaks[length] = peak
        print(
            f"{length:4d} min: peak {peak / GIB:.2f} GiB ({anonymous / GIB:.2f} without mapped files), "
            f"{length * 60 / seconds:.1f} times real time",
            flush=True,
        )
    print(f"longest / shortest: {peaks[max(peaks)] / peaks[min(peaks)]:.2f}")


def make(path: str, minutes: int) -> None:
    """Noise in bursts of half a second, written by the minute."""
    rng = np.random.default_rng(0)
    envelope = np.repeat(np.tile([1.0, 0.1], 60), audio.SAMPLE_RATE // 2)
    with soundfile.SoundFile(path, "w", audio.SAMPLE_RATE, 1) as file:
        for _ in range(minutes):
            file.write(0.1 * envelope * rng.standard_normal(len(envelope)))


def measure(path: str) -> None:
    """Score one file; print this process's peak and anonymous memory in bytes and the seconds it took."""
    from speechdistill.commands import score
    from speechdistill.models.load import load_teacher

    teacher = load_teacher("distillmos")
    start = time.perf_counter()
    (row,) = score.score_files([path], teacher)
    if row["error"]:
        raise SystemExit(row["error"])
    seconds = time.perf_counter() - start
    # Not getrusage: its maximum is inherited from the process that forked this one.
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    peak, anonymous = (int(lines[key].split()[0]) * 1024 for key in ("VmHWM", "RssAnon"))
    print(peak, anonymous, seconds)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--file"]:
        measure(sys.argv[2])
    else:
        main([int(argument) for argument in sys.argv[1:]] or [5, 15])

"""Speed of scoring against the released `distillmos` package, and what the faster modes do to the scores.

Each file goes from disk to its score, decoding included, on one thread of one process: the released package as its
own command line runs it, ours as `speechdistill score` does. All take turns, so that a busy machine slows all alike.
"""

import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from itertools import cycle, islice
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import soundfile
import tyro

from speechdistill.commands import score
from speechdistill.data.clips import Clips, clip_id
from speechdistill.data.degradation_recipes import weights_free
from speechdistill.data.plan import Plans
from speechdistill.io import audio, table
from speechdistill.labelling.samples import make_sample
from speechdistill.models.load import load_teacher
from speechdistill.models.options import TeacherOptions

Scorer = Callable[[str], float]

RECORDINGS = Path(__file__).resolve().parents[2] / "shared" / "data" / "speech"
RELEASED = "released, float32"
EXACT, FAST = "exact, float32", "fast, bfloat16"
MODES: dict[str, dict[str, Any]] = {
    EXACT: {},
    "exact, bfloat16": {"dtype": "bfloat16"},
    "fast, float32": {"hop_s": 7.68},
    FAST: {"hop_s": 7.68, "dtype": "bfloat16"},
}
TARGETS = {EXACT: {5: 1, 10: 1, 60: 1}, "exact, bfloat16": {5: 2, 10: 2, 60: 2}, FAST: {10: 5}}
REPEATS = {5: 15, 10: 9, 60: 3}
CLIP_LENGTHS_S = (10.0, 12.0, 15.0, 20.0)


@dataclass(frozen=True)
class Options:
    """Audio seconds per CPU second against the released package, and the scores of the faster modes."""

    speech: str | None = None
    """Folder of speech recordings. Default: ../shared/data/speech if it is there, else synthesised speech."""
    clips: int = 80
    """Degraded clips of 10 to 20 s whose scores are compared; 0 compares none."""
    seed: int = 1
    """Of the degradations."""


def main(options: Options) -> None:
    import torch

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        recordings = _recordings(options, Path(folder))
        ours = {mode: _ours(**settings) for mode, settings in MODES.items()}
        _print_speed(*_timed({RELEASED: _released(), **ours}, recordings, Path(folder)))
        if options.clips:
            degraded = list(_degraded(recordings, options, Path(folder)))
            _print_scores({mode: np.array([of(path) for path in degraded]) for mode, of in ours.items()})


def _recordings(options: Options, folder: Path) -> list[str]:
    if options.speech or RECORDINGS.is_dir():
        return score.expand([options.speech or str(RECORDINGS)])
    from speechdistill.data.corpora import espeak

    return [row["uri"] for row in espeak.rows(folder / "synthetic") if row["kind"] == "speech"]


def _ours(**settings: Any) -> Scorer:
    teacher = load_teacher("distillmos", TeacherOptions(device="cpu", **settings))

    def mos(path: str) -> float:
        (row,) = score.score_files([path], teacher)
        if row["error"]:
            raise SystemExit(f"{path}: {row['error']}")
        return float(row["mos"])

    return mos


def _released() -> Scorer:
    if missing := [name for name in ("distillmos", "xls_r_sqa") if not find_spec(name)]:
        raise SystemExit(
            f"{', '.join(missing)} not found; `pip install --no-deps distillmos==0.9.1 xls-r-sqa==0.1.0` brings the "
            "released package and the only dependency that its model needs beside torch"
        )
    # It is imported for the package's command line alone, and does not load beside a CPU build of torch.
    sys.modules.setdefault("torchaudio", ModuleType("torchaudio"))
    import torch
    from distillmos import ConvTransformerSQAModel

    model = ConvTransformerSQAModel().eval()

    def mos(path: str) -> float:
        wave, _ = soundfile.read(path, dtype="float32")
        with torch.no_grad():
            return float(model(torch.from_numpy(wave)[None]))

    return mos


def _timed(
    scorers: dict[str, Scorer], recordings: Sequence[str], folder: Path
) -> tuple[dict[str, dict[int, np.ndarray]], float]:
    """CPU seconds per scorer, length and round, and the largest difference of exact scores from the released."""
    seconds: dict[str, dict[int, np.ndarray]] = {name: {} for name in scorers}
    difference = 0.0
    for length, wave in zip(REPEATS, _cut(recordings, REPEATS), strict=True):
        path = str(folder / f"{length}.flac")
        soundfile.write(path, wave, audio.SAMPLE_RATE)
        rounds = [{name: _cpu_s(of, path) for name, of in scorers.items()} for _ in range(1 + REPEATS[length])]
        for name in scorers:
            seconds[name][length] = np.array([taken[name][0] for taken in rounds[1:]])  # the first warms up
        difference = max(difference, abs(rounds[0][EXACT][1] - rounds[0][RELEASED][1]))
    return seconds, difference


def _cpu_s(scorer: Scorer, path: str) -> tuple[float, float]:
    """CPU seconds of this process, all threads, and the score."""
    start = time.process_time()
    mos = scorer(path)
    return time.process_time() - start, mos


def _cut(
    recordings: Sequence[str], lengths_s: Iterator[float] | Sequence[float] | dict[int, int]
) -> Iterator[np.ndarray]:
    """Waves of these lengths, from the recordings joined end to end."""
    source, rest = cycle(recordings), np.zeros(0, np.float32)
    for length in lengths_s:
        samples = round(length * audio.SAMPLE_RATE)
        while len(rest) < samples:
            rest = np.concatenate([rest, audio.load(next(source))])
        yield rest[:samples]
        rest = rest[samples:]


def _degraded(recordings: Sequence[str], options: Options, folder: Path) -> Iterator[str]:
    """Files of `CLIP_LENGTHS_S`, degraded by the recipe that the labelling job uses by default."""
    rows = []
    for i, wave in enumerate(_cut(recordings, islice(cycle(CLIP_LENGTHS_S), options.clips))):
        path = str(folder / f"clean{i}.flac")
        soundfile.write(path, wave, audio.SAMPLE_RATE)
        known = {"kind": "speech", "duration_s": len(wave) / audio.SAMPLE_RATE, "sample_rate": 16000, "channels": 1}
        rows.append({"clip_id": clip_id("speech", path), "uri": path, **known})
    recipe = replace(weights_free(), segment_s=max(CLIP_LENGTHS_S))  # whole clips
    plans = Plans(recipe, Clips(table.from_rows(rows, "clip.v1")), options.seed)
    for i in range(options.clips):
        path = str(folder / f"degraded{i}.flac")
        soundfile.write(path, make_sample(plans[i])[0], audio.SAMPLE_RATE)
        yield path


def _print_speed(seconds: dict[str, dict[int, np.ndarray]], difference: float) -> None:
    print("\nAudio seconds per CPU second on one thread, decoding included (in brackets: times the released package)\n")
    print(f"| | {' | '.join(f'{length} s file' for length in REPEATS)} |\n|---|{'---|' * len(REPEATS)}")
    missed = []
    for name, taken in seconds.items():
        cells = []
        for length in REPEATS:
            ratio = float(np.median(seconds[RELEASED][length] / taken[length]))  # of neighbours in time
            cells.append(f"{length / np.median(taken[length]):.1f} ({ratio:.2f})")
            target = TARGETS.get(name, {}).get(length, 0)
            missed += [f"{name}, {length} s: {ratio:.2f} is below {target}"] if ratio < target else []
        print(f"| {name} | {' | '.join(cells)} |")
    print(f"\nlargest difference of the exact float32 mode from the released scores: {difference:.1e} MOS")
    print("targets: " + ("; ".join(missed) if missed else "all reached"), flush=True)


def _print_scores(scores: dict[str, np.ndarray]) -> None:
    exact = scores.pop(EXACT)
    low, high = CLIP_LENGTHS_S[0], CLIP_LENGTHS_S[-1]
    print(f"\nAgainst the exact float32 scores of {len(exact)} degraded clips of {low:g} to {high:g} s ", end="")
    print(f"(MOS {exact.min():.2f} to {exact.max():.2f}, standard deviation {exact.std():.2f})\n")
    print("| | mean difference | mean absolute | largest | PCC |\n|---|---|---|---|---|")
    for mode, found in scores.items():
        delta = found - exact
        pcc = np.corrcoef(found, exact)[0, 1]
        absolute = np.abs(delta)
        print(f"| {mode} | {delta.mean():+.4f} | {absolute.mean():.4f} | {absolute.max():.4f} | {pcc:.5f} |")


if __name__ == "__main__":
    main(tyro.cli(Options))

"""What degrading costs: milliseconds of CPU per second of audio, on one core, for each component and each recipe."""

import time
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import torch
import tyro

from speechdistill import audio, plan, table
from speechdistill.clips import Clips, clip_id
from speechdistill.plan import Plans
from speechdistill.samples import make_sample

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
# What others measured, for the same component; `-` where nobody did.
KNOWN = {"rooms.room": "0.6", "noise.noise": "0.35", "denoisers.spectral_gating": "2–4", "codecs.opus": "5.2"}
KNOWN |= {"codecs.band_limit": "0.07", "weights_free": "1.75"}
WARM_UP = 3  # samples; the first ones import and allocate


@dataclass(frozen=True)
class Options:
    """A minute or two on one core."""

    data: str = str(DATA)
    """Folder with speech/, noise/ and rir/."""
    samples: int = 200
    """Samples of each recipe, and of each component where it is alone."""


def main(options: Options) -> None:
    if not Path(options.data, "speech").is_dir():
        print(f"{options.data} has no folder speech; give --data DIR with speech/, noise/ and rir/")
        return
    torch.set_num_threads(1)
    manifest = _manifest(Path(options.data))
    made = [name for name, make in plan.RECIPES.items() if not plan.missing(make())]
    components = dict.fromkeys(
        name for recipe in made for stage in plan.RECIPES[recipe]().stages for name in stage.odds
    )
    # The same recordings with and without noise and rooms of their own: simulated rooms, coloured noise, babble.
    poor = manifest.filter(pc.equal(manifest["kind"], "speech"))
    print("\nMilliseconds of CPU per second of audio, one core; loading and quantising are part of recipes\n")
    print("| | with recordings | without | known |\n|---|---|---|---|", flush=True)
    for name in components:
        costs = [_alone(name, Clips(rows), options.samples) for rows in (manifest, poor)]
        print(f"| `{name}` | {costs[0]:.2f} | {costs[1]:.2f} | {KNOWN.get(name, '–')} |", flush=True)
    for name in made:
        costs = [_cost(plan.RECIPES[name](), Clips(rows), options.samples) for rows in (manifest, poor)]
        print(f"| recipe `{name}` | {costs[0]:.2f} | {costs[1]:.2f} | {KNOWN.get(name, '–')} |", flush=True)


def _manifest(data: Path) -> pa.Table:
    rows = []
    for kind in ("speech", "noise", "rir"):
        for path in sorted((data / kind).iterdir()):
            info = audio.probe(str(path))
            header = {"duration_s": info.duration_s, "sample_rate": info.sample_rate, "channels": info.channels}
            rows.append({"clip_id": clip_id(kind, str(path)), "uri": str(path), "kind": kind, **header})
    return table.from_rows(rows, "clip.v1")


def _alone(name: str, clips: Clips, samples: int) -> float:
    """The component's steps; its recipe makes nothing else."""
    bare, whole = (_cost(plan.Recipe(name, (plan.Stage("only", {name: odds}),)), clips, samples) for odds in (0.0, 1.0))
    return whole - bare


def _cost(recipe: plan.Recipe, clips: Clips, samples: int) -> float:
    """Milliseconds of CPU per second of audio."""
    plans = Plans(recipe, clips, seed=0)
    for number in range(WARM_UP):
        make_sample(plans[number])
    start = time.process_time()
    length = sum(len(make_sample(plans[number])[0]) for number in range(samples))
    return 1000 * (time.process_time() - start) / (length / audio.SAMPLE_RATE)


if __name__ == "__main__":
    main(tyro.cli(Options))

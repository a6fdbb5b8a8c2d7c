"""What degrading costs: milliseconds of CPU per second of audio, on one core, for each component and each recipe.

Recipes are what a worker of the labelling job does for a sample up to its int16 samples: plan, load, degrade, quantise.
What it does then is the row `storing`, as FLAC. Libraries are loaded before; files come from the page cache.

The networks of EnCodec, HiFi-GAN and Demucs have random weights of the real size where none are given, which cost the
same. Components that lack something are left out.
"""

import os
import tempfile
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
import tyro

from speechdistill.data import components, plan
from speechdistill.data.clips import Clips, clip_id
from speechdistill.data.degradation_recipes import RECIPES, RecipeName, network_passes, paper, weights_free, with_assets
from speechdistill.data.plan import Plans
from speechdistill.io import assets, audio, table
from speechdistill.io.errors import MissingError
from speechdistill.labelling.samples import make_sample

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
# What others measured, for the same component; `-` where nobody did.
KNOWN = {"rooms.room": "0.6", "noise.noise": "0.35", "denoisers.spectral_gating": "2–4", "codecs.opus": "5.2"}
KNOWN |= {"codecs.band_limit": "0.07", "weights_free": "1.75", "denoisers.nsnet2": "10", "paper": "97"}
KNOWN |= {"denoisers.deepfilternet3": "15", "denoisers.demucs": "95", "vocoders.hifigan": "90"}
KNOWN |= {"vocoders.lpcnet_codec2": "248", "codecs.encodec": "90"}
WARM_UP = 3  # samples; the first ones import and allocate


@dataclass(frozen=True)
class Options:
    """Some fifteen minutes on one core; without recipe paper, which has the networks, five."""

    data: str = str(DATA)
    """Folder with speech/, noise/ and rir/."""
    samples: int = 600
    """Samples of each recipe, and of each component where it is alone; a sixth of a recipe with networks, a thirtieth
    of a network. Recipes draw their components: of 600 samples 100 are coded by Opus."""
    recipes: tuple[RecipeName, ...] = ("paper", "weights_free", "voip", "as_is")
    """These and their components."""
    assets: dict[str, str] = field(default_factory=dict)
    """Weights and texts, by name, as for the labelling job."""


def main(options: Options) -> None:
    if not Path(options.data, "speech").is_dir():
        print(f"{options.data} has no folder speech; give --data DIR with speech/, noise/ and rir/")
        return
    torch.set_num_threads(1)
    manifest = _manifest(Path(options.data))
    with tempfile.TemporaryDirectory() as folder:
        made = _random_weights(Path(folder)) if "paper" in options.recipes else {}
        _report(manifest, options, made | options.assets)


def _report(manifest: pa.Table, options: Options, sources: dict[str, str]) -> None:
    chosen = {name: paper(lpcnet=True) if name == "paper" else RECIPES[name]() for name in options.recipes}
    recipes = {str(name): _complete(recipe, sources) for name, recipe in chosen.items()}
    if "weights_free" in recipes and "texts" in sources:
        recipes["weights_free, spoken"] = _complete(weights_free(texts=True), sources)
    stages = [stage for recipe in recipes.values() for stage in recipe.stages]
    found = {name: asset for recipe in recipes.values() for name, asset in recipe.assets.items()}
    # The same recordings with and without noise and rooms of their own: simulated rooms, coloured noise, babble.
    poor = manifest.filter(pc.equal(manifest["kind"], "speech"))
    print("\nMilliseconds of CPU per second of audio, one core; of recipes ± the standard error of what was drawn\n")
    print("| | with recordings | without | known |\n|---|---|---|---|", flush=True)
    for name in dict.fromkeys(name for stage in stages for name in stage.odds):
        number = -(-options.samples // 30) if components.component(name).network else options.samples
        costs = [_alone(name, Clips(rows), number, found) for rows in (manifest, poor)]
        print(f"| `{name}` | {costs[0]:.2f} | {costs[1]:.2f} | {KNOWN.get(name, '–')} |", flush=True)
    for name, recipe in recipes.items():
        number = -(-options.samples // 6) if network_passes(recipe) else options.samples
        costs = [_cost(recipe, Clips(rows), number) for rows in (manifest, poor)]
        shown = " | ".join(f"{cost:.2f} ± {error:.2f}" for cost, error in costs)
        print(f"| recipe `{name}` | {shown} | {KNOWN.get(name, '–')} |", flush=True)
    costs = [_storing(weights_free(), Clips(rows), options.samples) for rows in (manifest, poor)]
    print(f"| storing | {costs[0]:.2f} | {costs[1]:.2f} | – |", flush=True)


def _manifest(data: Path) -> pa.Table:
    rows = []
    for kind in ("speech", "noise", "rir"):
        for path in sorted((data / kind).iterdir()):
            info = audio.probe(str(path))
            header = {"duration_s": info.duration_s, "sample_rate": info.sample_rate, "channels": info.channels}
            rows.append({"clip_id": clip_id(kind, str(path)), "uri": str(path), "kind": kind, **header})
    return table.from_rows(rows, "clip.v1")


def _complete(recipe: plan.DegradationRecipe, sources: dict[str, str]) -> plan.DegradationRecipe:
    """The recipe with its assets, less the components that lack something."""
    given = replace(recipe, assets={name: assets.Asset(source) for name, source in sources.items()})
    try:
        return with_assets(given)
    except MissingError as error:
        print(f"recipe {recipe.name} is without {', '.join(error.components)}, which lack something")
        stages = [
            replace(stage, odds={name: p for name, p in stage.odds.items() if name not in error.components})
            for stage in recipe.stages
        ]
        return with_assets(replace(given, stages=tuple(stages)))


def _random_weights(folder: Path) -> dict[str, str]:
    from transformers import EncodecConfig, EncodecModel, SpeechT5HifiGan, SpeechT5HifiGanConfig

    EncodecModel(EncodecConfig()).save_pretrained(folder / "encodec")
    SpeechT5HifiGan(SpeechT5HifiGanConfig()).save_pretrained(folder / "hifigan")
    made = {name: str(folder / name) for name in ("encodec", "hifigan")}
    try:
        from denoiser.demucs import Demucs
    except ImportError:
        return made
    torch.save(Demucs(hidden=64, sample_rate=audio.SAMPLE_RATE).state_dict(), folder / "demucs")
    return {**made, "demucs": str(folder / "demucs")}


def _alone(name: str, clips: Clips, samples: int, found: dict[str, assets.Asset]) -> float:
    """The component's steps; its recipe makes nothing else."""
    bare, whole = (
        _cost(plan.DegradationRecipe(name, (plan.RecipeStage("only", {name: odds}),), assets=found), clips, samples)[0]
        for odds in (0.0, 1.0)
    )
    return whole - bare


def _cost(recipe: plan.DegradationRecipe, clips: Clips, samples: int) -> tuple[float, float]:
    """Milliseconds of CPU per second of audio, and its standard error."""
    plans = Plans(recipe, clips, seed=0)
    for number in range(WARM_UP):
        make_sample(plans[number])
    clock, seconds = [_cpu_s()], []
    for number in range(samples):
        seconds.append(len(make_sample(plans[number])[0]) / audio.SAMPLE_RATE)
        clock.append(_cpu_s())
    costs = np.diff(clock)
    mean = costs.sum() / sum(seconds)
    error = np.sqrt(np.sum((costs - mean * np.array(seconds)) ** 2)) / sum(seconds)  # of a ratio of sums
    return 1000 * float(mean), 1000 * float(error)


def _storing(recipe: plan.DegradationRecipe, clips: Clips, samples: int) -> float:
    """Milliseconds of CPU per second of audio for the bytes in a shard."""
    plans = Plans(recipe, clips, seed=0)
    waves = [make_sample(plans[number])[0] for number in range(samples)]
    start = _cpu_s()
    for wave in waves:
        audio.encode(wave, "flac")
    return 1000 * (_cpu_s() - start) / (sum(map(len, waves)) / audio.SAMPLE_RATE)


def _cpu_s() -> float:
    """Of all threads, and of child processes, in which espeak-ng and LPCNet work."""
    return time.process_time() + sum(os.times()[2:4])


if __name__ == "__main__":
    main(tyro.cli(Options))

"""Show a degradation recipe, or make one of its samples to listen to."""

import json
from dataclasses import dataclass, field
from typing import Annotated

import tyro

from speechdistill.commands.guarded import guarded
from speechdistill.data import degradation_recipes
from speechdistill.data.degradation_recipes import RecipeName
from speechdistill.io import outputs
from speechdistill.labelling import preview


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """A recipe as the labelling job takes it."""

    name: Annotated[RecipeName, tyro.conf.Positional]
    """The recipe."""
    without: tuple[str, ...] = ()
    """A component to leave out; its probability goes to 'none'. May be repeated."""
    assets: dict[str, str] = field(default_factory=dict)
    """Weights or texts of its components, NAME and a path or URL (hf://OWNER/MODEL too). May be repeated."""
    lpcnet: bool = False
    """Recipe paper: half of the vocoders are libcodec2's LPCNet codec."""


@dataclass(frozen=True, kw_only=True)
class Show(Chosen):
    """Print what a recipe does, in order, with which probability, and what its components need."""


@dataclass(frozen=True, kw_only=True)
class Listen(Chosen):
    """Make one sample of a run, as the labelling job makes it, and print its plan.

    It is the same bit for bit, but for steps of networks on a GPU: those of a batch may differ by 0.0001.
    """

    clips: str
    """The manifest that the ingest job wrote (clips.parquet)."""
    out: str
    """The WAV file to write; its clean segment is written beside it, as NAME-clean.wav."""
    seed: int = 0
    """The run's seed."""
    index: int = 0
    """The sample's number in the run (sample_id)."""


@guarded("nothing was written")
def command(
    config: Annotated[
        Annotated[tyro.conf.UseAppendAction[Show], tyro.conf.subcommand("show")]
        | Annotated[tyro.conf.UseAppendAction[Listen], tyro.conf.subcommand("listen")],
        tyro.conf.arg(name=""),
    ],
) -> int:
    """Degradation recipes: what they do, and how a sample sounds."""
    recipe = degradation_recipes.chosen(config.name, config.without, config.assets, config.lpcnet)
    if isinstance(config, Show):
        print(preview.show(recipe))
        return 0
    outputs.try_outputs(*preview.files(config.out))
    sample = preview.listen(recipe, config.clips, config.seed, config.index, config.out)
    print(json.dumps(json.loads(sample.to_json()), indent=2, ensure_ascii=False))
    return 0

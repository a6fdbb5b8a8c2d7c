"""Show a degradation recipe, or make one of its samples to listen to."""

import json
import sys
from dataclasses import dataclass, field
from typing import Annotated, get_args

import tyro

from speechdistill.commands.guarded import guarded
from speechdistill.data import degradation_recipes
from speechdistill.data.degradation_recipes import RecipeName
from speechdistill.io import outputs
from speechdistill.io.errors import UserError
from speechdistill.labelling import preview


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """Options that choose a recipe, as in the labelling job."""

    without: tuple[str, ...] = ()
    """A component to leave out; its probability goes to 'none'. May be repeated."""
    assets: dict[str, str] = field(default_factory=dict)
    """Weights or texts of a component: NAME and a path or URL (or hf://OWNER/MODEL). May be repeated."""
    lpcnet: bool = False
    """Recipe paper: half of the vocoders are libcodec2's LPCNet codec."""


@dataclass(frozen=True, kw_only=True)
class Show(Chosen):
    """Print a recipe's components in order, with their probabilities and the files that they need.

    Without a name, print all recipes.
    """

    name: Annotated[RecipeName | None, tyro.conf.Positional] = None
    """The recipe: weights_free, voip, as_is or paper."""


@dataclass(frozen=True, kw_only=True)
class Listen(Chosen):
    """Make one sample of a run, as the labelling job makes it, and print its plan.

    The sample is equal bit for bit, except for network steps on a GPU: those of a batch may differ by 0.0001.
    """

    name: Annotated[RecipeName, tyro.conf.Positional]
    """The recipe."""
    clips: str
    """The manifest that the ingest job wrote (clips.parquet)."""
    out: str
    """The WAV file to write; the clean segment is written beside it, as NAME-clean.wav."""
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
    """Show a degradation recipe, or make one of its samples to listen to."""
    if isinstance(config, Show) and config.name is None:
        if config.without or config.assets or config.lpcnet:
            raise UserError("no recipe is named", f"add one of {', '.join(get_args(RecipeName))}")
        print("\n\n".join(preview.show(degradation_recipes.chosen(name)) for name in get_args(RecipeName)))
        return 0
    assert config.name is not None
    recipe = degradation_recipes.chosen(config.name, config.without, config.assets, config.lpcnet)
    if isinstance(config, Show):
        print(preview.show(recipe))
        return 0
    outputs.try_outputs(*preview.files(config.out))
    sample = preview.listen(recipe, config.clips, config.seed, config.index, config.out)
    print(json.dumps(json.loads(sample.to_json()), indent=2, ensure_ascii=False))
    degraded, clean = preview.files(config.out)
    print(f"wrote {degraded} (degraded) and {clean} (clean)", file=sys.stderr)
    return 0

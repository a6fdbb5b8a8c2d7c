"""The degradation recipes that there are, the choice of one, and what its components need.

What is trained is in `training/recipes/`.
"""

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Literal

from speechdistill.data import components
from speechdistill.data.plan import DegradationRecipe, RecipeStage
from speechdistill.io import assets
from speechdistill.io.assets import Asset
from speechdistill.io.errors import LibraryError, MissingError, UserError

WEIGHTS_FREE = (
    "rooms.room",
    "noise.noise",
    "denoisers.spectral_gating",
    "codecs.opus",
    "codecs.band_limit",
)
"""The paper's components that need no trained weights."""


def paper(lpcnet: bool = False) -> DegradationRecipe:
    """The recipe of Distill-MOS, section IV-B.

    The paper's second vocoder, LPCNet on features that are not quantised, is not to be had as a library: with `lpcnet`
    the codec of libcodec2 stands for it, which is harsher; without it HiFi-GAN has the probability of both.
    """
    vocoders = ["vocoders.hifigan", *(["vocoders.lpcnet_codec2"] if lpcnet else [])]
    return DegradationRecipe(
        "paper",
        (
            RecipeStage("generation", {"generated.text_to_speech": 0.15}, ends=True),
            RecipeStage("room", {"rooms.room": 0.33}),
            RecipeStage("noise", {"noise.noise": 0.67}),
            RecipeStage(
                "denoiser",
                {
                    "denoisers.deepfilternet3": 1 / 5,
                    "denoisers.nsnet2": 1 / 5,
                    "denoisers.demucs": 1 / 5,
                    "denoisers.spectral_gating": 1 / 5,
                },
            ),
            RecipeStage("vocoder", {name: 0.33 / len(vocoders) for name in vocoders}),
            RecipeStage("codec", {"codecs.opus": 0.5 / 3, "codecs.encodec": 0.5 / 3, "codecs.band_limit": 0.5 / 3}),
        ),
    )


def weights_free(texts: bool = False) -> DegradationRecipe:
    """`paper` without the components that need trained weights: their probability goes to 'none' of their stage.

    With `texts`, sentences for it to say, espeak-ng stands for the paper's text-to-speech.
    """
    stages = [
        replace(stage, odds={name: p for name, p in stage.odds.items() if name in WEIGHTS_FREE})
        for stage in paper().stages
    ]
    generation = [RecipeStage("generation", {"generated.espeak": 0.15}, ends=True)] if texts else []
    return replace(paper(), name="weights_free", stages=(*generation, *(stage for stage in stages if stage.odds)))


def as_is() -> DegradationRecipe:
    """Recordings as they are, whole files in segments."""
    return DegradationRecipe("as_is", whole_files=True)


def voip() -> DegradationRecipe:
    """Beyond the paper: what calls do to speech. Rooms and noise as in the paper; the other odds are ours."""
    return DegradationRecipe(
        "voip",
        (
            RecipeStage("room", {"rooms.room": 0.33}),
            RecipeStage("noise", {"noise.noise": 0.67}),
            RecipeStage("clipping", {"levels.clipping": 0.2}),
            RecipeStage("level", {"levels.level_changes": 0.3}),
            RecipeStage(
                "transmission",
                {"packets.opus_loss": 0.5, "codecs.g711": 0.1, "codecs.g722": 0.1, "codecs.amr_nb": 0.1},
            ),
        ),
    )


RECIPES = {"paper": paper, "weights_free": weights_free, "voip": voip, "as_is": as_is}
COMPONENTS = tuple(
    dict.fromkeys(
        name
        for recipe in (*(make() for make in RECIPES.values()), paper(lpcnet=True), weights_free(texts=True))
        for name in recipe.components
    )
)
"""All that recipes have."""
RecipeName = Literal["weights_free", "voip", "as_is", "paper"]


def chosen(
    name: RecipeName, without: Collection[str] = (), sources: Mapping[str, str] | None = None, lpcnet: bool = False
) -> DegradationRecipe:
    """The recipe as a user asks for it: less the components `without`, with `sources` of assets, not looked at.

    Raises `UserError` for a name that the recipe has no use for.
    """
    if lpcnet and name != "paper":
        raise UserError(f"--lpcnet is an option of recipe paper, not of {name}", "leave it out, or give --recipe paper")
    recipe = paper(lpcnet) if name == "paper" else RECIPES[name]()
    sources = sources or {}
    if name == "weights_free" and "texts" in sources:
        recipe = weights_free(texts=True)
    known = recipe.components
    if unknown := sorted(set(without) - set(known)):
        choices = f"choose from {', '.join(known)}" if known else "leave it out"
        raise UserError(f"--without {' '.join(unknown)}: recipe {name} has no such component", choices)
    stages = [replace(stage, odds={c: p for c, p in stage.odds.items() if c not in without}) for stage in recipe.stages]
    wanted = {need.name for component in known for need in components.needs(component)}
    wanted |= {"texts"} if name == "weights_free" else set()
    if unknown := sorted(set(sources) - wanted):
        use = ", ".join(sorted(wanted)) or "none"
        raise UserError(f"--assets {' '.join(unknown)}: recipe {name} does not use it", f"leave it out; used: {use}")
    given = {name: Asset(source) for name, source in sources.items()}
    return replace(recipe, stages=tuple(stage for stage in stages if stage.odds), assets=given)


def with_assets(recipe: DegradationRecipe) -> DegradationRecipe:
    """The recipe with all that its components need looked up and hashed.

    Raises `MissingError` telling for each component that lacks something what it is, where to get it and its licence.
    """
    found: dict[str, Asset] = {}
    lacks: dict[str, list[str]] = {}
    for component in recipe.components:
        try:
            components.check(component)
        except LibraryError as error:
            lacks.setdefault(str(error), []).append(component)
        for need in components.needs(component):
            try:
                if need.name not in found:
                    given = recipe.assets.get(need.name)
                    found[need.name] = assets.looked_up(need, given.source if given else None)
            except MissingError as error:
                lacks.setdefault(str(error), []).append(component)
    if lacks:
        lines = "".join(f"\n  {', '.join(components)}: {reason}" for reason, components in lacks.items())
        names = tuple(dict.fromkeys(component for of_reason in lacks.values() for component in of_reason))
        left_out = " ".join(f"--without {name}" for name in names)
        raise MissingError(
            f"recipe {recipe.name!r} has components that lack what they need:{lines}\n",
            f"recipe 'weights_free' works without them; {left_out} leaves out just these",
            names,
        )
    return replace(recipe, assets=found)


def network_passes(recipe: DegradationRecipe) -> int:
    """How many times a sample's steps change, at most, from ordinary ones to those of networks."""
    ordinary, network, most = 0, 0, 0
    for stage in recipe.stages:
        kinds = {components.network(name) is not None for name in stage.odds}
        after_network = max(network, ordinary + 1) if True in kinds else network
        most = max(most, after_network)
        if not stage.ends:
            ordinary, network = max(ordinary, network) if False in kinds else ordinary, after_network
    return most

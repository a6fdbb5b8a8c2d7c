"""The degradation recipes, the choice of one by name, and the assets of its components.

Training recipes are in `training/recipes/`.
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
"""Components of the paper that need no trained weights."""


def paper(lpcnet: bool = False) -> DegradationRecipe:
    """Return the recipe of Distill-MOS, section IV-B.

    The paper's second vocoder, LPCNet on unquantised features, is not available as a library. With `lpcnet` the harsher
    codec of libcodec2 replaces it; otherwise HiFi-GAN gets the probability of both.
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
    """Return `paper` without the components that need trained weights; their probability goes to 'none' of their stage.

    With `texts`, espeak-ng reads sentences instead of the paper's text-to-speech.
    """
    stages = [
        replace(stage, odds={name: p for name, p in stage.odds.items() if name in WEIGHTS_FREE})
        for stage in paper().stages
    ]
    generation = [RecipeStage("generation", {"generated.espeak": 0.15}, ends=True)] if texts else []
    return replace(paper(), name="weights_free", stages=(*generation, *(stage for stage in stages if stage.odds)))


def as_is() -> DegradationRecipe:
    """Return the recipe that degrades nothing and covers whole files with segments."""
    return DegradationRecipe("as_is", whole_files=True)


def voip() -> DegradationRecipe:
    """Return the degradations of calls, beyond the paper. Rooms and noise are the paper's; the other odds are ours."""
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
"""The components of all recipes."""
RecipeName = Literal["weights_free", "voip", "as_is", "paper"]


def chosen(
    name: RecipeName, without: Collection[str] = (), sources: Mapping[str, str] | None = None, lpcnet: bool = False
) -> DegradationRecipe:
    """Return a recipe without the components `without`, and with `sources` of assets, which are not opened.

    Raises `UserError` for a component or asset that the recipe does not use.
    """
    if lpcnet and name != "paper":
        raise UserError(
            f"--lpcnet is an option of recipe paper, not of {name}", "leave out --lpcnet, or give --recipe paper"
        )
    recipe = paper(lpcnet) if name == "paper" else RECIPES[name]()
    sources = sources or {}
    if name == "weights_free" and "texts" in sources:
        recipe = weights_free(texts=True)
    known = recipe.components
    if unknown := sorted(set(without) - set(known)):
        choices = f"choose from {', '.join(known)}" if known else "leave it out"
        raise UserError(f"--without {' '.join(unknown)}: recipe {name} has no such component", choices)
    stages = [replace(stage, odds={c: p for c, p in stage.odds.items() if c not in without}) for stage in recipe.stages]
    used = {need.name for name in known for need in components.component(name).needs}
    used |= {"texts"} if recipe.name == "weights_free" else set()
    if unknown := sorted(set(sources) - used):
        use = ", ".join(sorted(used)) or "none"
        raise UserError(f"--assets {' '.join(unknown)}: recipe {name} does not use it", f"leave it out; used: {use}")
    given = {name: Asset(source) for name, source in sources.items()}
    return replace(recipe, stages=tuple(stage for stage in stages if stage.odds), assets=given)


def with_assets(recipe: DegradationRecipe) -> DegradationRecipe:
    """Return the recipe with the assets of its components looked up and hashed.

    Raises `MissingError` listing what each component lacks, where to get it and its licence.
    """
    resolved: dict[str, Asset] = {}
    lacks: dict[str, list[str]] = {}  # names of components by reason
    for name in recipe.components:
        component = components.component(name)
        try:
            component.check()
        except LibraryError as error:
            lacks.setdefault(str(error), []).append(name)
        for need in component.needs:
            try:
                if need.name not in resolved:
                    given = recipe.assets.get(need.name)
                    resolved[need.name] = assets.looked_up(need, given.source if given else None)
            except MissingError as error:
                lacks.setdefault(str(error), []).append(name)
    if lacks:
        lines = "".join(f"\n  {', '.join(names)}: {reason}" for reason, names in lacks.items())
        names = tuple(dict.fromkeys(name for of_reason in lacks.values() for name in of_reason))
        left_out = " ".join(f"--without {name}" for name in names)
        raise MissingError(
            f"recipe {recipe.name!r} has components that lack what they need:{lines}\n",
            f"recipe 'weights_free' works without them; {left_out} leaves out just these",
            names,
        )
    return replace(recipe, assets=resolved)


def network_passes(recipe: DegradationRecipe) -> int:
    """Return how often the steps of a sample change from ordinary ones to steps of networks, at most."""
    ordinary, network, most = 0, 0, 0
    for stage in recipe.stages:
        kinds = {components.component(name).network is not None for name in stage.odds}
        after_network = max(network, ordinary + 1) if True in kinds else network
        most = max(most, after_network)
        if not stage.ends:
            ordinary, network = max(ordinary, network) if False in kinds else ordinary, after_network
    return most

"""Configurations whose options stand in groups, made from options by name as the command line makes them."""

from dataclasses import fields, is_dataclass, replace
from typing import Any, TypeVar

from speechdistill.data.plan import DegradationRecipe
from speechdistill.labelling.job import Labeller, Prepared, Samples, Stored, TeacherId

Config = TypeVar("Config")


def config_of(kind: type[Config], **options: Any) -> Config:
    """A configuration with these options, whichever group each is in."""
    own = {name: options.pop(name) for name in list(options) if name in {field.name for field in fields(kind)}}  # type: ignore[arg-type]
    return changed(kind(**own), **options)


def changed(config: Config, **options: Any) -> Config:
    """The configuration with other values for these options."""
    values: dict[str, Any] = {}
    for field in fields(config):  # type: ignore[arg-type]
        value = getattr(config, field.name)
        if field.name in options:
            values[field.name] = options.pop(field.name)
        elif is_dataclass(value) and (names := option_names(value) & options.keys()):
            values[field.name] = changed(value, **{name: options.pop(name) for name in names})
    assert not options, f"{type(config).__name__} has no {sorted(options)}"
    return replace(config, **values)  # type: ignore[type-var]


def option_names(config: Any) -> set[str]:
    """The options of a configuration, those of its groups included."""
    names = set()
    for field in fields(config):
        value = getattr(config, field.name)
        names |= option_names(value) if is_dataclass(value) else {field.name}
    return names


def prepared(recipe: DegradationRecipe) -> Prepared:
    """A labelling job that was not checked, of a manifest that is not there."""
    return Prepared(
        samples=Samples(),
        labeller=Labeller(),
        stored=Stored(),
        recipe=recipe,
        num_samples=1,
        teacher=TeacherId(name="teacher", sha256="0", dtype="float32"),
        clips="clips.parquet",
        clips_sha256="0",
    )

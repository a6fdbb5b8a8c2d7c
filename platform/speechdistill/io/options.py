"""Groups of options: frozen keyword-only dataclasses that commands combine and functions take."""

from dataclasses import fields, is_dataclass
from typing import Any


class OptionError(Exception):
    """An option with an unusable value: reason and fix. The command ends with one line and exit code 2.

    Not a `UserError`: the parser of the command line would handle a `ValueError` as its own and lose the fix.
    """

    def __init__(self, reason: str, fix: str) -> None:
        super().__init__(reason, fix)

    def __str__(self) -> str:
        return "; ".join(self.args)


def at_least(group: Any, **smallest: float) -> None:
    """Raise `OptionError` if a field of `group` is below its `smallest` value; None is always allowed."""
    for name, least in smallest.items():
        value = getattr(group, name)
        if value is not None and not value >= least:
            raise OptionError(f"--{name.replace('_', '-')} is {value}", f"it must be at least {least:g}")


def flat(config: Any) -> dict[str, Any]:
    """Return all options of a command by name, including those of groups, without those that are None."""
    options: dict[str, Any] = {}
    for field in fields(config):
        value = getattr(config, field.name)
        if is_dataclass(value):
            options |= flat(value)
        elif value is not None:
            options[field.name] = value
    return options

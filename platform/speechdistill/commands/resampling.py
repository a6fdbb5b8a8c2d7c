"""Options of the bootstrap, for commands that state intervals."""

from dataclasses import dataclass

from speechdistill.io.options import OptionError, at_least

_FEWEST = 100


@dataclass(frozen=True, kw_only=True)
class Bootstrap:
    """The bootstrap that intervals are from."""

    resamples: int = 1_000
    """Resamples of the bootstrap."""
    seed: int = 0
    """Seed of the bootstrap's random draws."""

    def __post_init__(self) -> None:
        if self.resamples < _FEWEST:
            raise OptionError(f"--resamples is {self.resamples}", f"a 95% interval needs at least {_FEWEST}")
        at_least(self, seed=0)

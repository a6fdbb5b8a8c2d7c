"""speechdistill: label speech with a large teacher, distil it into small students, promote the winner."""

from collections.abc import Callable
from typing import Any

from speechdistill.io.version import __version__

__all__ = ["__version__", "load"]


def load(name: str = "distillmos", **options: Any) -> Callable[..., float]:
    """Load a speech-quality model as a function: `load("distillmos")(wave, sample_rate)` is a MOS from 1 to 5.

    `wave` is a NumPy array or torch tensor, shape (num_samples,) or (num_samples, channels), at any rate.
    Options are the fields of `models.options.TeacherOptions`. Raises `ValueError` for audio that cannot be scored.
    """
    from speechdistill.models.load import load_teacher  # keeps torch out of `import speechdistill`
    from speechdistill.models.model import Model
    from speechdistill.models.options import TeacherOptions

    return Model(load_teacher(name, TeacherOptions(**options)))


def __dir__() -> list[str]:
    return __all__

"""The options of a teacher, one value for all teachers."""

from dataclasses import dataclass

from speechdistill.io.audio import SAMPLE_RATE, SEGMENT_S
from speechdistill.io.errors import UserError

HOP_S = 1.0
"""Longest hop between the windows of a long recording in the released model."""

WHOLE_S = 15.0
"""Longest recording that an XLS-R teacher takes in one pass, as the original advises."""

DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True, kw_only=True)
class TeacherOptions:
    """How to load a teacher.

    `weights` is a file or folder (default: the released weights; for a trained head, its encoder where training left
    it), `head` the file of the head above an encoder, `device` a torch device (default: CUDA if available). `batch_s`
    is the seconds of audio in the network at once, `hop_s` the longest hop between the windows of a long recording:
    above 1 s scoring is faster and not exact. `compile` makes torch compile the encoder's blocks. Raises `UserError`
    for an unknown dtype or an empty batch.
    """

    weights: str | None = None
    head: str | None = None
    device: str | None = None
    dtype: str = "float32"
    batch_s: float | None = None
    hop_s: float = HOP_S
    compile: bool = False

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise UserError(f"dtype {self.dtype!r}", f"choose from {list(DTYPES)}")
        if self.batch_s is not None and not self.batch_s > 0:
            raise UserError(f"batch_s {self.batch_s}", "give seconds of audio, above 0")

    def only(self, teacher: str, *special: str) -> None:
        """Raise `UserError` naming the teacher if `head` or `compile` is set but is not one of `special`."""
        lacking = [name for name in ("compile", "head") if getattr(self, name) and name not in special]
        if lacking:
            raise UserError(f"teacher {teacher!r} takes no {' and no '.join(lacking)}", "leave it out")

    def float32_only(self, teacher: str) -> None:
        """Raise `UserError` for another dtype."""
        if self.dtype != "float32":
            raise UserError(f"dtype {self.dtype!r}", f"teacher {teacher!r} is float32")

    def hop(self, longest_s: float = SEGMENT_S) -> int:
        """Return the hop in samples; raise `UserError` if it is longer than a window, `longest_s`."""
        if not 0 < self.hop_s <= longest_s:
            raise UserError(f"hop_s {self.hop_s}", f"choose seconds above 0 and up to {longest_s} (released: {HOP_S})")
        return max(1, round(self.hop_s * SAMPLE_RATE))

    def batch(self, default_s: float, window_s: float = SEGMENT_S) -> int:
        """Return the number of windows in the network at once, at least one."""
        return max(1, int((self.batch_s or default_s) / window_s + 1e-6))

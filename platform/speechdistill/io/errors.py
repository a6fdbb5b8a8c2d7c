"""Errors that a user can mend: one line with the reason and the fix, and exit code 1. Any other keeps its traceback."""


class UserError(ValueError):
    """A mistake or fault that the user can mend: `reason` says what is wrong, with the value, `fix` what to do."""

    def __init__(self, reason: str, fix: str) -> None:
        super().__init__(reason, fix)
        self.reason, self.fix = reason, fix

    def __str__(self) -> str:
        between = "" if self.reason.endswith("\n") else "; "
        return f"{self.reason}{between}{self.fix}"


class TableError(UserError):
    """A table, file or configuration that does not fit."""


class StorageError(UserError, OSError):
    """A path or URL whose storage refused, or did not answer after all retries."""


class RunError(UserError, RuntimeError):
    """A run that cannot start or resume."""


class LibraryError(UserError, ImportError):
    """An optional library that is not installed, or does not work here."""


class WeightsError(UserError, FileNotFoundError):
    """Trained weights that are not there."""


class MissingError(UserError):
    """An asset that is not there: `components` are those of the recipe that need it."""

    def __init__(self, reason: str, fix: str, components: tuple[str, ...] = ()) -> None:
        super().__init__(reason, fix)
        self.args = (reason, fix, components)  # pickling calls the class with these
        self.components = components


class AudioError(UserError):
    """An audio file that cannot be used; `path` is its path or URL."""

    def __init__(self, path: str, reason: str, fix: str) -> None:
        super().__init__(reason, fix)
        self.args = (path, reason, fix)
        self.path = path

    def __str__(self) -> str:
        return f"{self.path!r}: {self.reason}; {self.fix}"


class UnreadableError(AudioError):
    """An audio file that its storage did not deliver, which may be temporary. (A missing file is an `AudioError`.)"""

"""Errors that a user can fix: one line with reason and fix, and exit code 1. Other errors keep their traceback."""


class UserError(ValueError):
    """An error that the user can fix. `reason` says what is wrong, with the value; `fix` says what to do."""

    def __init__(self, reason: str, fix: str) -> None:
        super().__init__(reason, fix)
        self.reason, self.fix = reason, fix

    def __str__(self) -> str:
        between = "" if self.reason.endswith("\n") else "; "
        return f"{self.reason}{between}{self.fix}"


class TableError(UserError):
    """A table, file or configuration that does not fit."""


class StorageError(UserError, OSError):
    """A path or URL whose storage refused access, or did not answer after all retries."""


class RunError(UserError, RuntimeError):
    """A run that cannot start or resume."""


class LibraryError(UserError, ImportError):
    """An optional library that is not installed, or does not work on this machine."""


class WeightsError(UserError, FileNotFoundError):
    """Trained weights that do not exist."""


class MissingError(UserError):
    """An asset that does not exist; `components` of the recipe need it."""

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
    """An audio file that its storage did not deliver, perhaps temporarily. (A missing file is an `AudioError`.)"""

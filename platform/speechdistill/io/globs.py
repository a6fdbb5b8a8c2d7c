"""Match paths below a folder with globs, both as tuples of their parts."""

import glob
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath

EVERYTHING = ("**",)


def split(pattern: str) -> tuple[str, tuple[str, ...]]:
    """Return the folder before the first part with magic, and the parts from there."""
    parts = Path(pattern).parts
    first = next(number for number, part in enumerate(parts) if glob.has_magic(part))
    return str(Path(*parts[:first])), parts[first:]


def fits(place: tuple[str, ...], parts: tuple[str, ...]) -> bool:
    """Whether a path matches a glob; `**` stands for any number of parts."""
    if parts == EVERYTHING:
        return True
    if not parts:
        return not place
    if parts[0] == "**":
        return any(fits(place[start:], parts[1:]) for start in range(len(place) + 1))
    return bool(place) and fnmatchcase(place[0], parts[0]) and fits(place[1:], parts[1:])


def may_hold(place: tuple[str, ...], parts: tuple[str, ...]) -> bool:
    """Whether a folder may contain files that match a glob."""
    first = parts[: parts.index("**")] if "**" in parts else parts[:-1]
    if len(place) > len(first) and "**" not in parts:
        return False
    return all(fnmatchcase(*pair) for pair in zip(place, first, strict=False))


def is_spelled_out(name: str, parts: tuple[str, ...]) -> bool:
    """Whether a part of a glob names a hidden file or folder explicitly."""
    return any(fnmatchcase(name, part) for part in parts if part.startswith(".") or not glob.has_magic(part))


def names_suffix(pattern: str) -> bool:
    """Whether a glob ends in a suffix without magic."""
    suffix = PurePosixPath(pattern).suffix
    return bool(suffix) and not glob.has_magic(suffix)

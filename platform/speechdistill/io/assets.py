# io/: bytes, tables, storage, audio, tars, caches, weights, checkpoints, errors. It imports nothing of other wings.
"""Assets of a recipe's components, such as trained weights or texts: find, hash and download them."""

import hashlib
import os
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import fsspec

from speechdistill.io import storage
from speechdistill.io.errors import MissingError, UserError

_BLOCK_BYTES = 1 << 20


@dataclass(frozen=True)
class Need:
    """An asset of a component: one file, or `files` (glob patterns) in a folder, `every` one of them or any.

    `where` is the place to get the asset. `hub` is the id on the model hub that is used if the user gives no path
    (another model of the hub has the address hf://OWNER/NAME).
    """

    name: str
    what: str
    where: str
    licence: str
    files: tuple[str, ...] = ()
    hub: str | None = None
    every: bool = False


class Asset(NamedTuple):
    """The place of an asset (a path, an fsspec URL, or the hub id of its need), and the sha256 of its contents.

    The hash is "" until the contents were read.
    """

    source: str
    sha256: str = ""


def local(need: Need, asset: Asset) -> Path:
    """Return the asset as a local file or folder, checked against its sha256. A URL is downloaded and kept on the node.

    Raises `MissingError` if the asset does not exist, and `UserError` if it has changed.
    """
    path, sha256 = _found(need, asset)
    if sha256 != asset.sha256:
        raise UserError(
            f"{asset.source} has changed since the run was started ({need.what})", "put the same file on every node"
        )
    return path


def looked_up(need: Need, source: str | None) -> Asset:
    """Return the asset with its sha256; raises `MissingError`, and `UserError` for an address with credentials."""
    given = source or need.hub
    if not given:
        raise MissingError(f"{need.what} (licence: {need.licence})", _fix(need))
    if given != need.hub:
        given = storage.absolute(given)
    if "://" in given and ("?" in given or "@" in given.split("/")[2]):
        raise UserError(
            f"--assets {need.name}: the address is stored with every sample", "give one without credentials and query"
        )
    return Asset(given, _found(need, Asset(given))[1])


def _missing(need: Need, reason: str) -> MissingError:
    return MissingError(f"{reason}; wanted: {need.what} (licence: {need.licence})", _fix(need))


def _fix(need: Need) -> str:
    return f"get it from {need.where} and give --assets {need.name} PATH"


def _found(need: Need, asset: Asset) -> tuple[Path, str]:
    """Return the asset's path on this machine, and its sha256."""
    if "://" in asset.source:
        return _downloaded(need, asset)
    path = _from_hub(need) if asset.source == need.hub else Path(asset.source)
    return path, _sha256(need, path, asset.source)


def _downloaded(need: Need, asset: Asset) -> tuple[Path, str]:
    """Return the downloaded asset, shared by the node's processes under its sha256; a damaged copy is replaced."""
    kept = storage.private_folder(f"speechdistill-assets-{os.getuid()}")
    if asset.sha256 and _is_kept(need, kept / asset.sha256, asset.sha256):
        return kept / asset.sha256 / "asset", asset.sha256
    with storage.access(asset.source), tempfile.TemporaryDirectory(dir=kept) as folder:
        new = Path(folder, "new")
        _fetch(need, asset.source, new / "asset")
        sha256 = _sha256(need, new / "asset", asset.source)
        if not _is_kept(need, kept / sha256, sha256):
            with suppress(FileNotFoundError):
                (kept / sha256).rename(f"{folder}/spoilt")
            with suppress(FileExistsError):  # another process was faster
                new.rename(kept / sha256)
    return kept / sha256 / "asset", sha256


def _is_kept(need: Need, folder: Path, sha256: str) -> bool:
    try:
        return _sha256(need, folder / "asset", "") == sha256
    except MissingError:
        return False


def _fetch(need: Need, url: str, target: Path) -> None:
    fs, path = fsspec.url_to_fs(url)
    files = [file for pattern in need.files for file in fs.glob(f"{path.rstrip('/')}/{pattern}")] or [path]
    for file in files:
        place = target / file.removeprefix(path).lstrip("/") if need.files else target
        place.parent.mkdir(parents=True, exist_ok=True)
        try:
            fs.get_file(file, str(place))
        except (FileNotFoundError, IsADirectoryError) as error:
            raise _missing(need, f"{url} does not exist") from error


def _from_hub(need: Need) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return Path(snapshot_download(str(need.hub), allow_patterns=list(need.files)))
    except (HfHubHTTPError, OSError) as error:
        raise _missing(need, f"{need.hub} is not on this machine, and the hub does not answer") from error


def _sha256(need: Need, path: Path, source: str) -> str:
    """Return the sha256 of a file, or of the names and contents of a folder's `files`; raises `MissingError`."""
    files = [path]
    if need.files:
        matches_of = {pattern: [file for file in path.glob(pattern) if file.is_file()] for pattern in need.files}
        lacks = [pattern for pattern, matches in matches_of.items() if not matches]
        if need.every and lacks and len(lacks) < len(matches_of):
            raise _missing(need, f"{source} lacks {', '.join(lacks)}")
        files = sorted({file for matches in matches_of.values() for file in matches})
    if not files or not files[0].is_file():
        kind = f"a folder with {', '.join(need.files)}" if need.files else "a file"
        raise _missing(need, f"{source} does not exist, or is not {kind}")
    digest = hashlib.sha256()
    for file in files:
        if need.files:
            digest.update(f"{file.relative_to(path).as_posix()}\0{file.stat().st_size}\0".encode())
        with file.open("rb") as data:
            while block := data.read(_BLOCK_BYTES):
                digest.update(block)
    return digest.hexdigest()

"""One writer at a time in an output folder: a lease file with a heartbeat, on local disks, NFS and object stores.

A command that writes into OUT holds `OUT/.lease-<number>`, which names its holder, and renews it every 10 s. A lease is
dead if it was not renewed for 60 s, or if its process on this machine has ended; claimants do not wait for the latter.
A claimant creates the next number, reads all leases back, and removes the dead ones before it. Ages and "now" are
modification times from the store (now: of an empty file written for this), so clocks need not agree.

The protocol rests on the exclusive creation of a file: of two claimants at once, one succeeds.

- local disks and NFS (3 and later): open with O_CREAT | O_EXCL; a renewal is utime with the server's time;
- S3: put with `If-None-Match: *`. Compatible stores that refuse that header (501) get a plain put if the object does
  not exist; stores that ignore it are noticed when another claimant's content is read back;
- GCS and Azure: `pipe_file(mode="create")` of gcsfs and adlfs, a condition on generation and on overwriting;
- other fsspec stores: a check that the file does not exist, then a write; two claimants within these two requests may
  both hold the lease.

A lost answer does no harm: a claimant holds the lease with its own content. A holder that could not renew for 60 s
checks that it still holds the lease before it writes again (`Lease.check`). A holder whose lease was taken over is
stopped.
"""

import errno
import json
import logging
import os
import platform
import random
import re
import signal
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import fsspec

from speechdistill.io import storage
from speechdistill.io.errors import RunError, StorageError

_LOG = logging.getLogger(__name__)
_NAME = re.compile(r"\.lease-(\d+)")
_BEAT_S, _DEAD_S = 10.0, 60.0
_CLOCK = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)  # includes the time of a suspended machine


class LeaseError(RunError):
    """An output folder that another command writes into."""


class Lease:
    """The right to write into `out`, held from `claim` to `release`."""

    def __init__(self, out: str, command: str) -> None:
        self._out, self._is_local = out, "://" not in out
        with storage.access(out):
            self._fs, self._folder = fsspec.url_to_fs(out, use_listings_cache=False)
        since = datetime.now().astimezone().isoformat(" ", "seconds")
        about = {"command": command, "host": platform.node(), "pid": os.getpid(), "since": since}
        self._content = json.dumps({**about, "machine": machine(), "key": uuid.uuid4().hex}).encode()
        self._name, self._renewed_s = "", 0.0
        self._over, self.lost = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True, name="lease")

    def claim(self) -> None:
        """Take the lease; raises `LeaseError` naming its holder. Waits for a holder elsewhere that may be dead."""
        if self._is_local:
            with storage.access(self._out):
                Path(self._out).mkdir(parents=True, exist_ok=True)
        with storage.access(self._out):
            while not self._is_claimed():
                time.sleep(random.uniform(0, _BEAT_S / 100))
            self._thread.start()

    def check(self) -> None:
        """Raise `LeaseError` if the lease was taken over. Call it before a write that only one command may make."""
        if not self.lost.is_set() and now_s() - self._renewed_s > _DEAD_S:
            with storage.access(self._out):
                self._renew()
        if self.lost.is_set():
            raise LeaseError(
                f"{self._out} was taken over by another command: this one did not renew its lease for {_DEAD_S:.0f} s",
                "wait until the other command has ended, then rerun this one",
            )

    def release(self) -> None:
        self._over.set()
        self._thread.join(_BEAT_S)
        with suppress(Exception):  # of the storage: the next command waits until the lease is dead
            if self._leases().get(self._name) == self._content:
                self._remove(self._name)

    def _is_claimed(self) -> bool:
        dead = self._leases()
        for name, content in dead.items():
            self._wait_until_dead(name, content)
        name = f".lease-{1 + max((_number(name) for name in dead), default=0):06d}"
        self._create(name)
        there = self._leases()
        if there.pop(name, None) != self._content:
            return False
        if there != dead:  # another claimant came in between
            self._remove(name)
            return False
        self._name, self._renewed_s = name, now_s()
        for other in dead:
            self._remove(other)
        return True

    def _wait_until_dead(self, name: str, content: bytes) -> None:
        """Return once the lease `name` is gone, changed or dead; raises `LeaseError` if its holder lives."""
        holder = _holder(content)
        is_here = holder.get("machine") == machine()
        if is_here and not _is_running(holder["pid"]):
            return
        renewed, began = self._modified(name), now_s()
        if renewed is None:
            return
        # A folder that was restored or moved may have a time in the future, which is no sign of life.
        age_s = max(0.0, (self._store_time() - renewed).total_seconds())
        if age_s < _DEAD_S and not is_here:
            text = "%s may still be in use by %s; waiting up to %.0f s for a sign of life"
            _LOG.warning(text, self._out, _described(holder), _DEAD_S - age_s)
        while age_s + now_s() - began < _DEAD_S and self._leases().get(name) == content:
            if is_here or self._modified(name) not in (None, renewed):
                reason = f"{self._out} is in use by {_described(holder)}"
                raise LeaseError(reason, "wait until that command has ended, or give another --out")
            time.sleep(_BEAT_S / 10 if content else _BEAT_S / 1000)  # the content may not be written yet

    def _beat(self) -> None:
        is_told = False
        while not self._over.wait(_BEAT_S):
            try:
                self._renew()
            except Exception as error:  # an outage; `check` renews again
                if not is_told:
                    _LOG.warning("%s: its lease cannot be renewed (%s); renewal is retried", self._out, error)
                is_told = True
            if self.lost.is_set():
                if not self._over.is_set():
                    _interrupt_main()
                return

    def _renew(self) -> None:
        there, began = self._leases(), now_s()
        if there.get(self._name) != self._content or max(there) > self._name:
            self.lost.set()
            return
        try:
            if self._is_local:
                os.utime(f"{self._folder}/{self._name}")
            else:
                self._fs.pipe_file(f"{self._folder}/{self._name}", self._content)
            self._renewed_s = began
        except FileNotFoundError:
            self.lost.set()

    def _leases(self) -> dict[str, bytes]:
        """Return the contents of all leases by name."""
        leases = {}
        with suppress(FileNotFoundError):
            for path in self._fs.ls(self._folder, detail=False):
                name = path.rsplit("/", 1)[-1]
                if _NAME.fullmatch(name):
                    with suppress(FileNotFoundError):
                        leases[name] = self._fs.cat_file(path)
        return leases

    def _create(self, name: str) -> None:
        path = f"{self._folder}/{name}"
        try:
            if self._is_local:
                with Path(path).open("xb") as file:
                    file.write(self._content)
            else:
                self._fs.pipe_file(path, self._content, mode="create")
        except FileExistsError:
            pass
        except OSError as error:
            if error.errno == errno.ENOSYS and not self._fs.exists(path):
                self._fs.pipe_file(path, self._content)
            elif error.errno not in (errno.ENOSYS, errno.EBUSY):  # S3: 409 if two write at once
                raise

    def _modified(self, name: str) -> datetime | None:
        try:
            modified: datetime = self._fs.modified(f"{self._folder}/{name}")
            return modified
        except FileNotFoundError:
            return None
        except NotImplementedError as error:
            reason = f"{self._out}/{name} exists, and its storage reports no time for it"
            raise StorageError(reason, "delete it if no command writes into that folder") from error

    def _store_time(self) -> datetime:
        name = f".time-{uuid.uuid4().hex}"
        self._fs.pipe_file(f"{self._folder}/{name}", b"")
        try:
            return self._modified(name) or datetime.now(UTC)
        finally:
            self._remove(name)

    def _remove(self, name: str) -> None:
        with suppress(Exception):  # some users may write and not delete: a lease left behind is dead after a while
            self._fs.rm_file(f"{self._folder}/{name}")


@contextmanager
def held(out: str, command: str) -> Iterator[Lease]:
    """Hold `out`, a folder as `storage.absolute` gives it, for `command`; raises `LeaseError` if another command does.

    If the lease is taken over, the body is interrupted as by Ctrl-C, and `LeaseError` is raised.
    """
    lease = Lease(out, command)
    lease.claim()
    try:
        yield lease
    except KeyboardInterrupt:
        if lease.lost.is_set():
            lease.check()
        raise
    finally:
        lease.release()


def _number(name: str) -> int:
    return int(name.rsplit("-", 1)[-1])


def _holder(content: bytes) -> dict[str, Any]:
    try:
        return dict(json.loads(content))
    except ValueError:  # the lease is being written, or its writer was killed
        return {}


def _described(holder: dict[str, Any]) -> str:
    if not holder:
        return "a command that has just started"
    return f"`speechdistill {holder['command']}` on {holder['host']} (process {holder['pid']}) since {holder['since']}"


def machine() -> str:
    """Return the identity of the system whose process ids are shared: several containers may share a host name."""
    parts = [platform.node()]
    with suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        parts.append(str(Path("/proc/self/ns/pid").readlink()))
    return " ".join(parts)


def _is_running(pid: int) -> bool:
    import psutil

    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def _interrupt_main() -> None:
    """Interrupt the main thread as Ctrl-C does; background processes may ignore SIGINT, so SIGTERM is next."""
    for number in (signal.SIGINT, signal.SIGTERM):
        if callable(signal.getsignal(number)):
            signal.pthread_kill(threading.main_thread().ident or 0, number)
            return


def now_s() -> float:
    """Return the seconds since this machine started, suspended time included."""
    return time.clock_gettime(_CLOCK)

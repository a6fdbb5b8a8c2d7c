"""Output of commands, which survives the encoding of a terminal and readers that have gone."""

import io
import os
import sys
from contextlib import suppress
from typing import Any, TextIO

from speechdistill.io.errors import StorageError


class _Lasting(io.BufferedIOBase):
    """Bytes of a stream, unbuffered. They are dropped once the reader of a pipe or terminal has gone.

    A full disk is an error for results; messages are dropped.
    """

    def __init__(self, raw: Any, has_results: bool) -> None:
        self._raw, self._has_results = raw, has_results
        self.is_read = True

    def writable(self) -> bool:
        return True

    def isatty(self) -> bool:
        return bool(self._raw.isatty())

    def fileno(self) -> int:
        return int(self._raw.fileno())

    def write(self, data: Any, /) -> int:
        left = memoryview(data).cast("B")
        size = len(left)
        try:
            while left and self.is_read:
                left = left[self._raw.write(left) or 0 :]
        except (BrokenPipeError, ConnectionResetError):
            self.is_read = False
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.fileno())  # for libraries and child processes as well
        except OSError as error:
            if not self._has_results:
                return size
            raise StorageError(f"printing failed ({error})", "fix the cause and rerun the command") from error
        return size


def make_lasting() -> None:
    """Make standard output and error escape characters that their encoding lacks, and outlive their readers.

    One call covers all output of a command: results, messages, progress bars, help, logs.
    """
    for name in ("stdout", "stderr"):
        stream: TextIO | None = getattr(sys, name)
        if stream is None:  # closed by the shell, `>&-`
            setattr(sys, name, open(os.devnull, "w"))  # noqa: PTH123, SIM115
        elif not isinstance(getattr(stream, "buffer", None), _Lasting) and hasattr(stream, "buffer"):
            with suppress(OSError):
                stream.flush()
            lasting = _Lasting(getattr(stream.buffer, "raw", stream.buffer), name == "stdout")
            setattr(sys, name, io.TextIOWrapper(lasting, stream.encoding, "backslashreplace", write_through=True))


def printed(text: str) -> bool:
    """Print results; return whether all of them were printed. If not, the caller must keep them elsewhere."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    try:
        sys.stdout.write(text.encode(encoding, "backslashreplace").decode(encoding))
        sys.stdout.flush()
    except OSError:
        return False
    return getattr(getattr(sys.stdout, "buffer", None), "is_read", True)

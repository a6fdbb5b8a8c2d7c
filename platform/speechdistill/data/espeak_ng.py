"""Speech by espeak-ng, the library in the package espeakng_loader (GPL-3). Equal texts give equal samples.

espeak-ng keeps state, so samples depend on earlier texts of the process. A helper process, this file run as a program,
therefore forks for every text. Forking the caller instead could copy a lock that another thread holds. The helper
imports only little of the standard library, so that it starts fast.
"""

import json
import os
import sys
from collections.abc import Iterator, Sequence
from typing import Any, TypedDict

_SEED = 2512  # for the breath noise of some voices


class Job(TypedDict):
    """A text in a voice (`de`, or `de+f2` with a variant), at a pitch of 0..99 and a rate in words per minute."""

    text: str
    voice: str
    pitch: int
    rate: int


def speak(jobs: Sequence[Job]) -> Iterator[tuple[bytes, int]]:
    """Yield int16 samples in native byte order, and their rate, for each job in turn.

    Raises `LibraryError` if espeak-ng is not installed, and `RuntimeError` if it fails on a text.
    """
    if not jobs:
        return
    import subprocess
    import tempfile

    library, data = installed()
    request = {"library": library, "data": data, "jobs": jobs}
    with tempfile.TemporaryFile() as given, tempfile.TemporaryFile() as errors:
        given.write(json.dumps(request).encode())
        given.seek(0)
        command = [sys.executable, "-I", "-S", os.path.abspath(__file__)]  # noqa: PTH100
        with subprocess.Popen(command, stdin=given, stdout=subprocess.PIPE, stderr=errors) as helper:
            assert helper.stdout
            for _ in jobs:
                header = helper.stdout.read(8)
                size, rate = int.from_bytes(header[:4], "little"), int.from_bytes(header[4:], "little")
                pcm = helper.stdout.read(size)
                if not pcm or len(pcm) < size:
                    helper.wait()
                    errors.seek(0)
                    message = errors.read().decode(errors="replace").strip()
                    raise RuntimeError(f"espeak-ng failed: {message[-800:] or helper.returncode}")
                yield pcm, rate


def installed() -> tuple[str, str]:
    """Return the paths of the library and its data; raises `LibraryError` if they are not installed."""
    from speechdistill.io.errors import LibraryError

    try:
        import espeakng_loader
    except ImportError as error:
        raise LibraryError("espeak-ng is not installed", 'pip install "speechdistill[demo]"') from error
    return espeakng_loader.get_library_path(), espeakng_loader.get_data_path()


def _helper() -> None:
    """Run the helper process: fork for each text, and load the library anew in each fork."""
    request = json.load(sys.stdin)
    for job in request["jobs"]:
        child = os.fork()
        if child == 0:
            try:
                pcm, rate = _synthesise(request["library"], request["data"], job)
                with os.fdopen(1, "wb") as out:
                    out.write(len(pcm).to_bytes(4, "little") + rate.to_bytes(4, "little") + pcm)
            except BaseException:
                sys.excepthook(*sys.exc_info())
                sys.stderr.flush()
                os._exit(1)  # without the clean-up of the helper
            os._exit(0)
        if os.waitpid(child, 0)[1]:
            sys.exit(f"voice {job['voice']}, text {job['text']!r}")


def _synthesise(library: str, data: str, job: dict[str, Any]) -> tuple[bytes, int]:
    """Synthesise a text with the functions and constants of espeak-ng's speak_lib.h."""
    import ctypes

    samples = bytearray()

    def received(wave: int | None, num_samples: int, _events: int | None) -> int:
        if wave:
            samples.extend(ctypes.string_at(wave, 2 * num_samples))
        return 0

    callback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p)(received)
    espeak = ctypes.CDLL(library)
    os.chdir(os.path.dirname(data))  # noqa: PTH120  # espeak-ng truncates data paths to 160 characters
    synchronous, utf8, rate, pitch = 2, 1, 1, 3
    sample_rate = espeak.espeak_Initialize(synchronous, 0, b".", 0)
    espeak.espeak_ng_SetRandSeed(ctypes.c_long(_SEED))  # seeded by the clock otherwise
    espeak.espeak_SetSynthCallback(callback)
    if espeak.espeak_SetVoiceByName(job["voice"].encode()):
        raise ValueError(f"espeak-ng has no voice {job['voice']}")
    espeak.espeak_SetParameter(rate, job["rate"], 0)
    espeak.espeak_SetParameter(pitch, job["pitch"], 0)
    text = job["text"].encode() + b"\0"
    espeak.espeak_Synth(text, ctypes.c_size_t(len(text)), 0, 1, 0, utf8, None, None)
    espeak.espeak_Synchronize()
    if not samples:
        raise RuntimeError("espeak-ng returned no samples")
    return bytes(samples), sample_rate


if __name__ == "__main__":
    _helper()

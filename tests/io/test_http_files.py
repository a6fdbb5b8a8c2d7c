"""Web servers with byte ranges, without, and such that do not tell a file's length."""

import threading
from collections.abc import Iterator
from contextlib import closing
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

from sounds import wav
from speechdistill.io import audio, http_files

DATA = wav(np.random.default_rng(0).bytes(1_300_000), 1_300_000)


class Server(BaseHTTPRequestHandler):
    """Gives DATA at any path: /ranges, /none (as Python's own server), /refused (which says so), /chunked."""

    protocol_version = "HTTP/1.1"
    sent: int

    def do_HEAD(self) -> None:
        self._answer(0, len(DATA), with_body=False)

    def do_GET(self) -> None:
        wanted = self.headers.get("Range") if self.path == "/ranges" else None
        first, last = wanted.removeprefix("bytes=").split("-") if wanted else (0, len(DATA) - 1)
        self._answer(int(first), int(last) + 1, with_body=True)

    def _answer(self, start: int, end: int, with_body: bool) -> None:
        is_part, is_chunked = end - start < len(DATA), self.path == "/chunked"
        self.send_response(206 if is_part else 200)
        if self.path == "/refused":
            self.send_header("Accept-Ranges", "none")
        if is_part:
            self.send_header("Content-Range", f"bytes {start}-{end - 1}/{len(DATA)}")
        self.send_header(*(("Transfer-Encoding", "chunked") if is_chunked else ("Content-Length", str(end - start))))
        self.end_headers()
        if with_body:
            Server.sent += end - start
            body = b"%x\r\n%b\r\n0\r\n\r\n" % (len(DATA), DATA) if is_chunked else DATA[start:end]
            try:
                self.wfile.write(body)
            except ConnectionError:  # who reads the beginning only
                self.close_connection = True

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.mark.parametrize("kind", ["ranges", "none", "refused", "chunked"])
def test_every_part_of_a_file_is_read_from_any_server(url: str, kind: str) -> None:
    Server.sent = 0
    with closing(http_files.open_file(f"{url}/{kind}", 1 << 16)) as file:
        assert (file.seek(0, 2), file.seek(0), file.read(100)) == (len(DATA), 0, DATA[:100])
        for place in (1_000_000, 400_000, len(DATA) - 10):
            file.seek(place)
            assert file.read(1000) == DATA[place : place + 1000]
            assert file.tell() == min(place + 1000, len(DATA))
        assert (Server.sent < 500_000) == (kind == "ranges"), Server.sent
        file.seek(7)
        assert file.read() == DATA[7:]


@pytest.mark.parametrize("kind", ["ranges", "none", "refused", "chunked"])
def test_audio_is_read_from_any_server(url: str, kind: str) -> None:
    """Headers as `ingest` reads them, whole waves as `score` does, sections as `pseudolabel` does."""
    wave = np.frombuffer(DATA[44:], "<i2") / np.float32(32_768)
    assert audio.probe(f"{url}/{kind}").num_samples == len(wave) == 650_000
    np.testing.assert_array_equal(audio.load(f"{url}/{kind}"), wave)
    np.testing.assert_array_equal(audio.load(f"{url}/{kind}", 400_000, 5_000), wave[400_000:405_000])


def test_a_file_that_is_not_there_stays_an_error(url: str) -> None:
    with pytest.raises((OSError, ValueError)):
        http_files.open_file("http://127.0.0.1:9/none", 1 << 16)

"""A real S3 server (moto, in a process of its own) behind a proxy that fails as networks and object stores do."""

import socket
import struct
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from http.client import HTTPConnection, HTTPMessage
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from random import Random

import s3fs

# Faults, and the methods that can have them.
KINDS = {
    "500 InternalError": "GET HEAD PUT POST DELETE",
    "503 SlowDown": "GET HEAD PUT POST DELETE",
    "reset": "GET HEAD PUT POST DELETE",  # before any answer; the store has not seen the request
    "lost answer": "GET HEAD PUT POST DELETE",  # the request is carried out
    "torn read": "GET",  # half of the promised bytes
    "torn upload": "PUT POST",  # half of the client's bytes: S3 stores nothing of them
}
BUCKET = "bucket"
CREDENTIALS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}
Fault = Callable[[str, str], str | None]
"""(method, path with query) -> how this request fails, or None."""

# It ends with its stdin, so it never outlives the tests.
_SERVER = """
import sys
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
server.start()
print("http://{}:{}".format(*server.get_host_and_port()), flush=True)
sys.stdin.read()
"""


class Store:
    """The S3 server with one empty bucket; `fs` reads and writes it directly, without faults."""

    def __enter__(self) -> "Store":
        command = [sys.executable, "-c", _SERVER]
        quiet = subprocess.DEVNULL  # a line per request
        self._server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=quiet, text=True)
        assert self._server.stdout
        self.url = self._server.stdout.readline().strip()
        keys = {"key": CREDENTIALS["AWS_ACCESS_KEY_ID"], "secret": CREDENTIALS["AWS_SECRET_ACCESS_KEY"]}
        self.fs = s3fs.S3FileSystem(endpoint_url=self.url, use_listings_cache=False, skip_instance_cache=True, **keys)
        self.fs.mkdir(BUCKET)
        return self

    def __exit__(self, *_: object) -> None:
        self._server.kill()
        self._server.communicate()

    def check_credentials(self, on: bool) -> None:
        """From now on the server refuses the keys above, which it does not know; or it takes any keys."""
        connection = HTTPConnection(self.url.removeprefix("http://"))
        connection.request("POST", "/moto-api/reset-auth", "0" if on else "inf")
        assert connection.getresponse().status == 200
        connection.close()


def at_random(seed: int, rate: float = 0.05, kinds: Sequence[str] = tuple(KINDS)) -> Fault:
    """One request in `1 / rate` fails, in one of the `kinds` that its method can have."""
    print(f"faults: seed {seed}, rate {rate:g}")
    rng, lock = Random(seed), threading.Lock()

    def fault(method: str, path: str) -> str | None:
        possible = [kind for kind in kinds if method in KINDS[kind].split()]
        with lock:
            return rng.choice(possible) if possible and rng.random() < rate else None

    return fault


class Proxy(ThreadingHTTPServer):
    """Passes requests to the S3 server at `upstream`, but for those for which `fault` names one of `KINDS`."""

    daemon_threads = True
    block_on_close = False

    def __init__(self, upstream: str, fault: Fault = lambda method, path: None) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.upstream = upstream.removeprefix("http://")
        self.fault = fault
        self.passed, self.faults = 0, Counter[str]()

    @property
    def environment(self) -> dict[str, str]:
        """What a process needs to take this proxy for S3."""
        return {**CREDENTIALS, "AWS_ENDPOINT_URL": "http://{}:{}".format(*self.server_address[:2])}

    def __enter__(self) -> "Proxy":
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()
        print(f"{self.passed} requests passed, failed: {dict(self.faults)}")


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: Proxy

    def _serve(self) -> None:
        fault = self.server.fault(self.command, self.path)
        if fault:
            self.server.faults[fault] += 1
        else:
            self.server.passed += 1
        if fault == "torn upload":
            self.rfile.read(int(self.headers.get("Content-Length", 2)) // 2)
        if fault in ("reset", "torn upload"):
            return self._reset()
        body = self._body()
        if fault and fault[0] == "5":
            return self._error(*fault.split())
        status, headers, data = self._ask(body)
        if fault == "lost answer":
            return self._reset()
        self._answer(status, headers, data[: len(data) // 2] if fault == "torn read" else data)
        if fault == "torn read":
            self.close_connection = True
        return None

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _serve

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        data = b""
        while size := int(self.rfile.readline().split(b";")[0], 16):
            data += self.rfile.read(size)
            self.rfile.readline()
        while self.rfile.readline().strip():  # trailers
            pass
        return data

    def _ask(self, body: bytes) -> tuple[int, HTTPMessage, bytes]:
        upstream = HTTPConnection(self.server.upstream)
        upstream.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
        hop = {"connection", "expect", "transfer-encoding", "content-length"}
        for name, value in self.headers.items():
            if name.lower() not in hop:  # Host stays: it is signed
                upstream.putheader(name, value)
        upstream.putheader("Content-Length", str(len(body)))
        upstream.endheaders(body)
        response = upstream.getresponse()
        data = response.read()
        upstream.close()
        return response.status, response.headers, data

    def _answer(self, status: int, headers: HTTPMessage, data: bytes) -> None:
        self.send_response_only(status)
        for name, value in headers.items():
            if name.lower() not in {"connection", "transfer-encoding", "content-length"}:
                self.send_header(name, value)
        self.send_header("Content-Length", headers.get("Content-Length", str(len(data))))
        self.end_headers()
        self.wfile.write(data)

    def _error(self, status: str, code: str) -> None:
        text = f"<?xml version='1.0' encoding='UTF-8'?><Error><Code>{code}</Code><Message>a fault</Message></Error>"
        self.send_response_only(int(status))
        self.send_header("Content-Type", "application/xml")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(text.encode())

    def _reset(self) -> None:
        """Close with RST, which discards what is on its way."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()
        self.close_connection = True

    def log_message(self, *_: object) -> None:
        pass

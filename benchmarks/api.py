"""Requests a second of the HTTP API by itself: a simulated node answers at once.

``python -m pyagent_node.benchmarks.api`` prints one JSON object.  The server is a process of its
own; four connections ask as fast as they get answers.
"""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import threading
import time
from typing import Final

CONNECTIONS: Final = 4
TOKENS: Final = 48
_SERVER: Final = """
import sys, trio
from pyagent_node.simulations.api import simulated_api

async def main():
    async with simulated_api() as api:
        print(api.server.port, flush=True)
        await trio.to_thread.run_sync(sys.stdin.read)

trio.run(main)
"""


def request(method: str, path: str, body: object = None) -> bytes:
    """Return an HTTP request."""
    data = b"" if body is None else json.dumps(body).encode()
    head = f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(data)}\r\n\r\n"
    return head.encode() + data


def complete(reply: bytes) -> bool:
    """Tell whether ``reply`` is a whole response."""
    head, end, body = reply.partition(b"\r\n\r\n")
    lower = head.lower()
    if not end:
        return False
    if b"transfer-encoding: chunked" in lower:
        return body.endswith(b"0\r\n\r\n")
    return len(body) >= int(lower.partition(b"content-length: ")[2].split(b"\r", 1)[0])


def rate(port: int, message: bytes, count: int) -> float:
    """Return requests a second for ``message``, asked ``count`` times over all connections."""

    def worker() -> None:
        sock = socket.create_connection(("127.0.0.1", port))
        for _ in range(count // CONNECTIONS):
            sock.sendall(message)
            reply = b""
            while not complete(reply):
                part = sock.recv(65536)
                if not part:
                    raise ConnectionError("the server closed the connection")
                reply += part
            if b"connection: close" in reply.partition(b"\r\n\r\n")[0].lower():
                sock.close()
                sock = socket.create_connection(("127.0.0.1", port))
        sock.close()

    threads = [threading.Thread(target=worker) for _ in range(CONNECTIONS)]
    began = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return count / (time.perf_counter() - began)


def measure() -> dict[str, float]:
    """Return the rates by kind of request."""
    server = subprocess.Popen(
        [sys.executable, "-c", _SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert server.stdin is not None
    assert server.stdout is not None
    try:
        port = int(server.stdout.readline())
        chat = {
            "model": "words",
            "messages": [{"role": "user", "content": "hello"}],
            "max_tokens": TOKENS,
            "stream": True,
        }
        one = {"model": "words", "prompt": "hello", "max_tokens": 1}
        streams = rate(port, request("POST", "/v1/chat/completions", chat), 400)
        return {
            "healthz_per_second": round(rate(port, request("GET", "/healthz"), 4000)),
            "completions_per_second": round(
                rate(port, request("POST", "/v1/completions", one), 3000)
            ),
            "streams_per_second": round(streams),
            "streamed_tokens_per_second": round(streams * TOKENS),
        }
    finally:
        server.stdin.close()
        server.wait()
        server.stdout.close()


if __name__ == "__main__":
    print(json.dumps(measure()))

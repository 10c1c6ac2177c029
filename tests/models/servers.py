"""Real HTTP servers on this machine that behave and misbehave as asked, and one that speaks the Hub's language."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

Answer = Callable[[BaseHTTPRequestHandler], None]


@dataclass
class Site:
    """A running server: its address, what it answers by path, and what it was asked."""

    address: str
    answers: dict[str, Answer] = field(default_factory=dict)
    asked: list[tuple[str, str, str]] = field(default_factory=list)  # method, path, Range

    def url(self, path: str) -> str:
        return self.address + path

    def ranges(self) -> list[str]:
        """The Range header of every GET, in order."""
        return [range_ for method, _, range_ in self.asked if method == "GET"]


@contextlib.contextmanager
def serving() -> Iterator[Site]:
    """Run a server in a thread of this process."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            site.asked.append((self.command, self.path, self.headers.get("Range", "")))
            self.close_connection = True
            answer = site.answers.get(self.path.partition("?")[0], refuse(404))
            with contextlib.suppress(ConnectionError):
                answer(self)

        do_HEAD = do_GET  # noqa: N815 - the base class names it

        def log_message(self, *args: object) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    site = Site(address=f"http://127.0.0.1:{server.server_address[1]}")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield site
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def reply(handler: BaseHTTPRequestHandler, status: int, headers: dict[str, object], body: bytes = b"") -> None:
    """Send exactly these headers and bytes, whether they agree or not."""
    handler.send_response(status)
    for name, value in headers.items():
        handler.send_header(name, str(value))
    handler.send_header("Connection", "close")
    handler.end_headers()
    if handler.command != "HEAD":
        handler.wfile.write(body)


def refuse(status: int) -> Answer:
    return lambda handler: reply(handler, status, {"Content-Length": 0})


def redirect(to: str, status: int = 302) -> Answer:
    return lambda handler: reply(handler, status, {"Location": to, "Content-Length": 0})


def each(*answers: Answer) -> Answer:
    """Give one answer after the other; the last one from then on."""
    left = list(answers)
    return lambda handler: (left.pop(0) if len(left) > 1 else left[0])(handler)


def file(
    body: bytes,
    *,
    cut: int | None = None,
    length: int | None = None,
    ranges: bool = True,
    etag: str | None = "",
    if_range: bool = True,
    pace: float = 0.0,
) -> Answer:
    """Serve a file as a good server does, except for what is asked.

    Args:
        body: The file.
        cut: Close the connection after this many bytes of the answer.
        length: Claim this Content-Length.
        ranges: Know Range.
        etag: Validator; ``""`` for one made of the body, ``None`` for none at all.
        if_range: Heed If-Range.
        pace: Seconds between blocks of 4 kB.
    """
    tag = f'"{hashlib.md5(body).hexdigest()}"' if etag == "" else etag

    def answer(handler: BaseHTTPRequestHandler) -> None:
        match = re.fullmatch(r"bytes=(\d+)-", handler.headers.get("Range", "")) if ranges else None
        if match and if_range and handler.headers.get("If-Range", tag) != tag:
            match = None
        start = int(match[1]) if match else 0
        headers: dict[str, object] = {"ETag": tag} if tag else {}
        if match and start >= len(body):
            reply(handler, 416, {**headers, "Content-Range": f"bytes */{len(body)}", "Content-Length": 0})
            return
        if match:
            headers["Content-Range"] = f"bytes {start}-{len(body) - 1}/{len(body)}"
        part = body[start:]
        headers["Content-Length"] = len(part) if length is None else length
        part = part[:cut]
        reply(handler, 206 if match else 200, headers, part if not pace else b"")
        for begin in range(0, len(part) if pace else 0, 4096):
            handler.wfile.write(part[begin : begin + 4096])
            time.sleep(pace)

    return answer


def chunked(body: bytes, *, cut: bool = False) -> Answer:
    """Serve without a length, in chunks; ``cut`` leaves the last one out."""
    half = len(body) // 2
    frames = b"".join(f"{len(part):x}\r\n".encode() + part + b"\r\n" for part in (body[:half], body[half:]))
    end = b"" if cut else b"0\r\n\r\n"
    return lambda handler: reply(handler, 200, {"Transfer-Encoding": "chunked"}, frames + end)


COMMIT = "0123456789abcdef0123456789abcdef01234567"
NEWER = "89abcdef0123456789abcdef0123456789abcdef"


def hub(site: Site, repo: str, files: dict[str, bytes], *, commit: str = COMMIT, branch: str = "main") -> None:
    """Put a repository on the site: the part of the Hub's API that a download uses."""
    about = {"id": repo, "modelId": repo, "sha": commit, "siblings": [{"rfilename": name} for name in files]}
    told = {"Content-Type": "application/json"}
    for revision in (branch, commit):
        body = json.dumps(about).encode()
        site.answers[f"/api/models/{repo}/revision/{revision}"] = _json(body, told)
        for name, data in files.items():
            site.answers[f"/{repo}/resolve/{revision}/{name}"] = _resolved(data, commit)
    if branch == "main":
        site.answers[f"/api/models/{repo}"] = site.answers[f"/api/models/{repo}/revision/main"]


def hub_error(status: int, code: str) -> Answer:
    """Refuse as the Hub does."""
    return lambda handler: reply(handler, status, {"X-Error-Code": code, "Content-Length": 0})


def _json(body: bytes, headers: dict[str, object]) -> Answer:
    return lambda handler: reply(handler, 200, {**headers, "Content-Length": len(body)}, body)


def _resolved(data: bytes, commit: str) -> Answer:
    headers = {"X-Repo-Commit": commit, "ETag": f'"{hashlib.sha256(data).hexdigest()}"', "Content-Length": len(data)}
    return lambda handler: reply(handler, 200, headers, data)

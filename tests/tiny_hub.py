"""A Hugging Face hub on this machine: the answers that huggingface_hub asks for, of one repository in a folder."""

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Hub:
    """What it serves, how it fails, and what was asked of it."""

    repository: str
    folder: Path
    sizes: dict[str, int] = field(default_factory=dict)
    """What the list says of files, where it is not the truth."""
    more_names: tuple[str, ...] = ()
    """Names in the list beside those of the folder."""
    breaks_at: str | None = None
    """Of this file half comes, once, and then nothing more."""
    refusal: tuple[int, dict[str, str]] | None = None
    """Status and headers of every answer."""
    address: str = ""
    asked: list[tuple[str, str, str | None]] = field(default_factory=list)
    """Method, file and range of every request for a file."""

    def names(self) -> list[str]:
        return sorted(str(path.relative_to(self.folder)) for path in self.folder.rglob("*") if path.is_file())

    def fetched(self) -> list[str]:
        """Files whose contents were asked for."""
        return [name for method, name, _ in self.asked if method == "GET"]

    def listing(self) -> bytes:
        siblings = [
            {"rfilename": name, "size": self.sizes.get(name, (self.folder / name).stat().st_size)}
            for name in self.names()
        ]
        siblings += [{"rfilename": name, "size": 4} for name in self.more_names]
        return json.dumps({"id": self.repository, "sha": COMMIT, "siblings": siblings}).encode()

    def tree(self) -> bytes:
        sizes = {name: (self.folder / name).stat().st_size for name in self.names()}
        return json.dumps([{"type": "file", "path": name, "size": sizes[name], "oid": name} for name in sizes]).encode()


class _Answers(BaseHTTPRequestHandler):
    hub: Hub

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        hub, path = self.hub, unquote(urlsplit(self.path).path)
        if hub.refusal is not None:
            status, headers = hub.refusal
            self._send(status, b"", headers)
            return
        about = f"/api/models/{hub.repository}"
        if path in (about, f"{about}/revision/main", f"{about}/tree/{COMMIT}"):
            content = hub.tree() if "/tree/" in path else hub.listing()
            self._send(200, content, {"Content-Type": "application/json"})
            return
        found = re.fullmatch(rf"/{hub.repository}/resolve/{COMMIT}/(.+)", path)
        if found is None or found[1] not in hub.names():
            self._send(404, b"", {"X-Error-Code": "EntryNotFound"})
            return
        self._send_file(found[1])

    def _send_file(self, name: str) -> None:
        hub, content = self.hub, (self.hub.folder / name).read_bytes()
        stated = self.headers.get("Range")
        hub.asked.append((self.command, name, stated))
        headers = {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": COMMIT}
        if self.command == "GET" and name == hub.breaks_at:
            halves = sum(method == "GET" and asked == name for method, asked, _ in hub.asked)
            if halves > 1:
                self._send(503, b"", {})
                return
            self.send_response(200)
            for key, value in {**headers, "Content-Length": str(len(content))}.items():
                self.send_header(key, value)
            self.end_headers()
            self.wfile.write(content[: len(content) // 2])
            self.wfile.flush()
            self.close_connection = True
            return
        begin = int(stated.removeprefix("bytes=").partition("-")[0]) if stated else 0
        if begin:
            headers["Content-Range"] = f"bytes {begin}-{len(content) - 1}/{len(content)}"
        self._send(206 if begin else 200, content[begin:], headers)

    def _send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: what was asked is in the hub."""


@contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Answers", (_Answers,), {"hub": hub}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    hub.address = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()

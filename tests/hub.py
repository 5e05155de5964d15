"""A stand-in for the Hugging Face hub: the part of its HTTP API that downloads of a snapshot use."""

import hashlib
import json
import threading
from collections.abc import Callable, Iterator, Set
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
NEXT_COMMIT = "89abcdef0123456789abcdef0123456789abcdef"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    commits: dict[str, dict[str, Path]]
    gated: set[str]
    token: str | None
    private: Set[str] = frozenset()
    hub: "Hub"

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def log_message(self, format: str, *args: object) -> None:
        pass

    def _answer(self, *, body: bool) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"{self.command} {path}")
        parts = path.strip("/").split("/")
        if parts[:2] == ["api", "models"] and len(parts) >= 4:
            self._api("/".join(parts[2:4]), parts[4:], body)
        elif len(parts) >= 5 and parts[2] == "resolve":
            self._file("/".join(parts[:2]), parts[3], "/".join(parts[4:]), body)
        else:
            self._error(404, None, body)
        self.hub.after_request(path)

    def _allowed(self, model: str, revision: str, body: bool) -> bool:
        if model not in self.commits:
            self._error(401, "RepoNotFound", body)
        elif model in self.gated and self.headers.get("Authorization") != f"Bearer {self.token}":
            self._error(403, "GatedRepo", body)
        elif revision not in ("main", *self.commits[model]):
            self._error(404, "RevisionNotFound", body)
        else:
            return True
        return False

    def _commit(self, model: str, revision: str) -> str:
        return list(self.commits[model])[-1] if revision == "main" else revision

    def _api(self, model: str, rest: list[str], body: bool) -> None:
        revision = rest[1] if len(rest) > 1 else "main"
        # the hub tells of gated models to everyone, only their files are kept back
        gated, self.gated = self.gated, set()
        allowed = self._allowed(model, revision, body)
        self.gated = gated
        if not allowed:
            return
        commit = self._commit(model, revision)
        folder = self.commits[model][commit]
        files = sorted(file for file in folder.rglob("*") if file.is_file())
        if rest[:1] == ["tree"]:
            listing: object = [
                {"type": "file", "path": _name(f, folder), "size": f.stat().st_size, "oid": _etag(f)} for f in files
            ]
        else:
            listing = {
                "id": model,
                "modelId": model,
                "sha": commit,
                "private": model in self.private,
                "gated": "auto" if model in gated else False,
                "tags": [],
                "siblings": [{"rfilename": _name(file, folder)} for file in files],
            }
        self._send(200, json.dumps(listing).encode(), {"Content-Type": "application/json"}, body)

    def _file(self, model: str, revision: str, name: str, body: bool) -> None:
        if not self._allowed(model, revision, body):
            return
        commit = self._commit(model, revision)
        file = self.commits[model][commit] / name
        if not file.is_file():
            self._error(404, "EntryNotFound", body)
            return
        headers = {"ETag": f'"{_etag(file)}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        self._send(200, file.read_bytes(), headers, body)

    def _error(self, status: int, code: str | None, body: bool) -> None:
        headers = {"X-Error-Code": code, "X-Error-Message": code} if code else {}
        self._send(status, b"{}", headers, body)

    def _send(self, status: int, content: bytes, headers: dict[str, str], body: bool) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if body:
            self.wfile.write(content)


def _name(file: Path, folder: Path) -> str:
    return file.relative_to(folder).as_posix()


def _etag(file: Path) -> str:
    return hashlib.sha1(file.read_bytes()).hexdigest()


class Hub:
    """A running stand-in. `requests` is what it was asked; `after_request` is called with the path of each."""

    def __init__(self, commits: dict[str, dict[str, Path]]) -> None:
        self.url = ""
        self.requests: list[str] = []
        self.after_request: Callable[[str], None] = lambda path: None
        self._commits = commits

    def push(self, model: str, folder: Path) -> None:
        """Make the files of `folder` the model's NEXT_COMMIT, and that its main branch."""
        self._commits[model][NEXT_COMMIT] = folder


@contextmanager
def serve(
    models: dict[str, Path],
    gated: set[str] = frozenset(),  # type: ignore[assignment]
    token: str | None = None,
    handler: type[_Handler] = _Handler,
) -> Iterator[Hub]:
    """Serve folders as models, each as COMMIT. Those in `gated` need the token. `handler` may answer more requests."""
    commits = {model: {COMMIT: folder} for model, folder in models.items()}
    hub = Hub(commits)
    handler = type("Handler", (handler,), {"commits": commits, "gated": set(gated), "token": token, "hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()

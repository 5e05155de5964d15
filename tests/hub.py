"""A stand-in for the Hugging Face hub: the part of its HTTP API that downloads use.

Weights are files of LFS, as they are there: the hub states their SHA-256.
"""

import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator, Set
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
NEXT_COMMIT = "89abcdef0123456789abcdef0123456789abcdef"

_LFS = (".gguf", ".safetensors")


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
        if self.hub.is_down:
            self._error(503, None, body)
            return
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
                {"type": "file", "path": _name(f, folder), "size": f.stat().st_size, "oid": _oid(f)}
                | ({"lfs": {"oid": _sha256(f), **_size_and_pointer(f)}} if f.suffix in _LFS else {})
                for f in files
            ]
        else:
            listing = {
                "id": model,
                "modelId": model,
                "sha": commit,
                "private": model in self.private,
                "gated": "auto" if model in gated else False,
                "tags": [],
                "siblings": [self._sibling(file, folder) for file in files],
            }
        self._send(200, json.dumps(listing).encode(), {"Content-Type": "application/json"}, body)

    def _sibling(self, file: Path, folder: Path) -> dict[str, object]:
        sibling: dict[str, object] = {"rfilename": self.hub.rename(_name(file, folder))}
        if "blobs=" in urlsplit(self.path).query:
            sibling |= {"size": file.stat().st_size, "blobId": _oid(file)}
            sibling |= {"lfs": {"sha256": _sha256(file), **_size_and_pointer(file)}} if file.suffix in _LFS else {}
        return sibling

    def _file(self, model: str, revision: str, name: str, body: bool) -> None:
        if not self._allowed(model, revision, body):
            return
        commit = self._commit(model, revision)
        file = self.commits[model][commit] / name
        if not file.is_file():
            self._error(404, "EntryNotFound", body)
            return
        content = file.read_bytes()
        headers = {"ETag": f'"{_oid(file)}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        if file.suffix in _LFS:
            headers |= {"X-Linked-Etag": f'"{_sha256(file)}"', "X-Linked-Size": str(len(content))}
        if wanted := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "")):
            start = int(wanted[1])
            self.hub.resumed.append(start)
            headers |= {"Content-Range": f"bytes {start}-{len(content) - 1}/{len(content)}"}
            self._send(206, content[start:], headers, body)
        else:
            self._send(200, content, headers, body, spoil=self.hub.spoil)

    def _error(self, status: int, code: str | None, body: bool) -> None:
        headers = {"X-Error-Code": code, "X-Error-Message": code} if code else {}
        self._send(status, b"{}", headers, body)

    def _send(
        self,
        status: int,
        content: bytes,
        headers: dict[str, str],
        body: bool,
        spoil: Callable[[bytes], bytes] = lambda content: content,
    ) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if body:
            sent = spoil(content)
            self.wfile.write(sent)
            self.close_connection = len(sent) < len(content)


def _name(file: Path, folder: Path) -> str:
    return file.relative_to(folder).as_posix()


def _oid(file: Path) -> str:
    return hashlib.sha1(file.read_bytes()).hexdigest()


def _sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _size_and_pointer(file: Path) -> dict[str, int]:
    return {"size": file.stat().st_size, "pointerSize": 130}


class Hub:
    """A running stand-in.

    Attributes:
        requests: what it was asked.
        resumed: the first bytes of the answers that were asked to begin later than at 0.
        is_down: it answers that it is out of service.
        after_request: called with the path of each request.
        spoil: what becomes of the content of a whole file on its way; a shorter one is cut off.
        rename: the name that it states for a file.
    """

    def __init__(self, commits: dict[str, dict[str, Path]]) -> None:
        self.url = ""
        self.requests: list[str] = []
        self.resumed: list[int] = []
        self.is_down = False
        self.after_request: Callable[[str], None] = lambda path: None
        self.spoil: Callable[[bytes], bytes] = lambda content: content
        self.rename: Callable[[str], str] = lambda name: name
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
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()

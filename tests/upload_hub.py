"""The stand-in for the hub, with the part of its HTTP API that uploads use: repositories, branches, LFS, commits."""

import base64
import hashlib
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import hub

TOKEN = "write"
READ_TOKEN = "read"
_LFS_SIZE = 10_000_000  # bytes: what is larger is no regular file of a repository


@dataclass(frozen=True)
class Commit:
    """A commit that has arrived, with the content of its files."""

    model: str
    branch: str
    message: str
    files: dict[str, bytes]


@dataclass
class Uploads:
    """What has arrived. `objects` are LFS contents by SHA-256; `refuse` is the path of requests that fail."""

    folder: Path
    commits: list[Commit] = field(default_factory=list)
    objects: dict[str, bytes] = field(default_factory=dict)
    branches: set[tuple[str, str]] = field(default_factory=set)
    refuse: str = ""


class _Handler(hub._Handler):
    uploads: Uploads
    private: set[str]

    def do_POST(self) -> None:
        path, content = self._request()
        match path.strip("/").split("/"):
            case _ if self.headers.get("Authorization") != f"Bearer {TOKEN}":
                known = self.headers.get("Authorization") == f"Bearer {READ_TOKEN}"
                self._json({"error": "no"}, 403 if known else 401)
            case _ if self.uploads.refuse and self.uploads.refuse in path:
                self._json({"error": "out of order"}, 400)
            case ["api", "validate-yaml"]:
                self._json({"errors": [], "warnings": []})
            case ["api", "repos", "create"]:
                self._create(json.loads(content))
            case ["api", "models", org, name, "branch", branch]:
                key = (f"{org}/{name}", branch)
                self._json({}, 409 if key in self.uploads.branches else 200)
                self.uploads.branches.add(key)
            case ["api", "models", org, name, "preupload", branch] if self._has(f"{org}/{name}", branch):
                self._json({"files": list(map(_mode, json.loads(content)["files"]))})
            case [org, name, "info", "lfs", *_] if self._has(f"{org}/{name.removesuffix('.git')}", "main"):
                self._json({"transfer": "basic", "objects": list(map(self._action, json.loads(content)["objects"]))})
            case ["lfs", "verify", oid]:
                said = json.loads(content)
                known = said["oid"] == oid and len(self.uploads.objects.get(oid, b"")) == said["size"]
                self._json({}, 200 if known else 404)
            case ["api", "models", org, name, "commit", branch] if self._has(f"{org}/{name}", branch):
                self._take(f"{org}/{name}", branch, [json.loads(line) for line in content.splitlines()])
            case _:
                self._json({"error": "no such place"}, 404)

    def do_PUT(self) -> None:
        path, content = self._request()
        oid = path.rpartition("/")[2]
        if (self.uploads.refuse and self.uploads.refuse in path) or hashlib.sha256(content).hexdigest() != oid:
            self._json({"error": "not this content"}, 400)
            return
        self.uploads.objects[oid] = content
        self._json({})

    def _request(self) -> tuple[str, bytes]:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"{self.command} {path}")
        if self.headers.get("Transfer-Encoding") != "chunked":
            return path, self.rfile.read(int(self.headers.get("Content-Length", 0)))
        content = b""
        while size := int(self.rfile.readline(), 16):
            content += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return path, content

    def _json(self, value: object, status: int = 200) -> None:
        self._send(status, json.dumps(value).encode(), {"Content-Type": "application/json"}, body=True)

    def _create(self, wanted: dict[str, Any]) -> None:
        model = f"{wanted['organization']}/{wanted['name']}"
        exists = model in self.commits
        if not exists:
            (self.uploads.folder / model).mkdir(parents=True)
            self.commits[model] = {hub.COMMIT: self.uploads.folder / model}
            if wanted.get("visibility") == "private" or wanted.get("private"):  # newer and older clients
                self.private.add(model)
        self._json({"url": f"{self.hub.url}/{model}"}, 409 if exists else 200)

    def _has(self, model: str, branch: str) -> bool:
        return model in self.commits and (branch == "main" or (model, branch) in self.uploads.branches)

    def _action(self, wanted: dict[str, Any]) -> dict[str, Any]:
        if wanted["oid"] in self.uploads.objects:
            return wanted
        places = {"upload": "content", "verify": "verify"}
        return wanted | {"actions": {k: {"href": f"{self.hub.url}/lfs/{v}/{wanted['oid']}"} for k, v in places.items()}}

    def _take(self, model: str, branch: str, lines: list[dict[str, Any]]) -> None:
        files = {}
        for line in lines[1:]:
            value = line["value"]
            files[value["path"]] = (
                base64.b64decode(value["content"]) if line["key"] == "file" else self.uploads.objects[value["oid"]]
            )
        commit = hashlib.sha1(str(len(self.uploads.commits)).encode()).hexdigest()
        if branch == "main":
            folder = self.uploads.folder / commit
            shutil.copytree(list(self.commits[model].values())[-1], folder)
            for name, content in files.items():
                (folder / name).write_bytes(content)
            self.commits[model][commit] = folder
        self.uploads.commits.append(Commit(model, branch, lines[0]["value"]["summary"], files))
        self._json({"commitUrl": f"{self.hub.url}/{model}/commit/{commit}", "commitOid": commit})


def _mode(file: dict[str, Any]) -> dict[str, Any]:
    is_large = file["path"].endswith(".gguf") or file["size"] > _LFS_SIZE
    return {"path": file["path"], "uploadMode": "lfs" if is_large else "regular", "shouldIgnore": False}


@contextmanager
def serve(folder: Path) -> Iterator[tuple[hub.Hub, Uploads]]:
    """Serve a hub without models, which takes uploads with TOKEN and keeps them in `folder`."""
    uploads = Uploads(folder)
    handler = type("Handler", (_Handler,), {"uploads": uploads, "private": set()})
    with hub.serve({}, handler=handler) as server:
        yield server, uploads

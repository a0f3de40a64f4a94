"""A real HTTP server on this machine that takes models as the Hugging Face Hub does."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from huggingface_hub import constants

TOKEN = "hf_never-in-a-file-or-log"


@dataclass
class Repository:
    private: bool
    files: dict[str, bytes] = field(default_factory=dict)
    commits: int = 0


@dataclass
class Hub:
    """``owner`` is whom TOKEN belongs to; ``refuses`` has the ends of paths that it answers with
    403; ``requests`` are the methods and paths that it was asked, ``tokens`` those it was shown."""

    owner: str = "me"
    refuses: tuple[str, ...] = ()
    repositories: dict[str, Repository] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    tokens: set[str] = field(default_factory=set)
    large: dict[str, bytes] = field(default_factory=dict)

    def __enter__(self) -> Hub:
        hub = self

        class Handler(_Handler):
            owner = hub

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"
        threading.Thread(target=self._http.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._http.shutdown()
        self._http.server_close()


def go_to(hub: str, patch: pytest.MonkeyPatch, token: str | None = TOKEN) -> None:
    """Let huggingface_hub of this process talk to that address alone, logged in by ``token``."""
    patch.setattr(constants, "ENDPOINT", hub)
    patch.setattr(constants, "HF_TOKEN_PATH", "/nowhere/token")
    patch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # large files over HTTP
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_OFFLINE"):
        patch.delenv(name, raising=False)
    if token is not None:
        patch.setenv("HF_TOKEN", token)


class _Handler(BaseHTTPRequestHandler):
    owner: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        name = self.path.removeprefix("/api/models/")
        if not self._begin():
            return
        if name not in self.owner.repositories:
            return self._answer(404, {"error": "Repository not found"})
        self._answer(200, {"id": name, "private": self.owner.repositories[name].private,
                           "sha": "0" * 40})

    def do_PUT(self) -> None:
        self.owner.requests.append(f"PUT {self.path}")
        self.owner.large[self.path.rpartition("/")[2]] = self._body()
        self._answer(200, {})

    def do_POST(self) -> None:
        body = self._body()
        if not self._begin():
            return
        path = self.path
        if path == "/api/repos/create":
            self._create(json.loads(body))
        elif path == "/api/validate-yaml":
            self._answer(200, {"errors": [], "warnings": []})
        elif path.endswith("/preupload/main"):
            self._answer(200, {"files": [
                {"path": file["path"], "shouldIgnore": False,
                 "uploadMode": "lfs" if file["path"].endswith("safetensors") else "regular"}
                for file in json.loads(body)["files"]]})
        elif path.endswith("/objects/batch"):
            self._answer(200, {"transfer": "basic", "objects": [
                {**wanted, "actions": {"upload": {"href": f"{self.owner.url}/lfs/{wanted['oid']}"}}}
                for wanted in json.loads(body)["objects"]]})
        else:
            self._commit(path.removeprefix("/api/models/").removesuffix("/commit/main"), body)

    def _create(self, wanted: Mapping[str, Any]) -> None:
        name = f"{wanted.get('organization') or self.owner.owner}/{wanted['name']}"
        there = name in self.owner.repositories
        if not there:
            private = wanted.get("visibility") == "private" or wanted.get("private") is True
            self.owner.repositories[name] = Repository(private)
        self._answer(409 if there else 200, {"url": f"{self.owner.url}/{name}"})

    def _commit(self, name: str, body: bytes) -> None:
        repository = self.owner.repositories[name]
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                assert value["encoding"] == "base64"
                repository.files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                content = self.owner.large[value["oid"]]
                assert hashlib.sha256(content).hexdigest() == value["oid"]
                repository.files[value["path"]] = content
        repository.commits += 1
        self._answer(200, {"commitUrl": f"{self.owner.url}/{name}/commit/1", "commitOid": "1" * 40,
                           "pullRequestUrl": None})

    def _begin(self) -> bool:
        """Note the request; False if it was refused."""
        self.owner.requests.append(f"{self.command} {self.path}")
        self.owner.tokens.add(self.headers.get("Authorization", ""))
        if self.path.endswith(self.owner.refuses or ("\n",)):
            self._answer(403, {"error": "Forbidden: pass a token that may write"})
            return False
        return True

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _answer(self, status: int, content: Mapping[str, Any]) -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

"""A stand-in for the Hugging Face hub: the endpoints that spvit's pushes and downloads call, on this machine."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

import pytest
import yaml

USER, TOKEN = "me", "hf_of_the_test"


@dataclass
class Repository:
    private: bool = False
    gated: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)

    def commit(self, branch: str, files: dict[str, bytes]) -> str:
        before = self.commits.get(self.branches.get(branch, ""), {})
        name = hashlib.sha1(repr((len(self.commits), sorted(files))).encode()).hexdigest()
        self.commits[name] = {**before, **files}
        self.branches[branch] = name
        return name

    def files(self, revision: str = "main") -> dict[str, bytes]:
        return self.commits[self.branches.get(revision, revision)]


@dataclass
class Hub:
    repositories: dict[str, Repository] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    address: str = ""

    def make(self, name: str, **settings: Any) -> Repository:
        self.repositories[name] = repository = Repository(**settings)
        repository.commit("main", {".gitattributes": b""})
        return repository


class Refusal(Exception):
    """A status, and the hub's own code for the reason; or of a model that exists its name."""


class Handler(BaseHTTPRequestHandler):
    hub: Hub

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def do_POST(self) -> None:
        self.answer()

    def answer(self) -> None:
        self.hub.requests.append(f"{self.command} {self.path}")
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        headers: dict[str, str] = {}
        try:
            found = self.found(self.path.partition("?")[0], body, headers)
            status, content = 200, found if isinstance(found, bytes) else json.dumps(found).encode()
        except Refusal as refusal:
            status, code = refusal.args
            content = json.dumps({"error": code, "url": f"{self.hub.address}/{code}"}).encode()
            headers["X-Error-Code"] = code
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def found(self, path: str, body: bytes, headers: dict[str, str]) -> Any:
        if path == "/api/validate-yaml":
            return {}
        if path == "/api/repos/create":
            return self.created(json.loads(body))
        if place := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            name, revision, file = place.groups()
            repository = self.repository(name)
            files = self.files(repository, revision)
            commit = repository.branches.get(revision, revision)
            if file not in files:
                headers["X-Repo-Commit"] = commit
                raise Refusal(404, "EntryNotFound")
            headers |= {"X-Repo-Commit": commit, "ETag": f'"{hashlib.sha1(files[file]).hexdigest()}"'}
            return files[file]
        if place := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(\w+))?(?:/([^/]+))?", path):
            name, action, revision = place.groups()
            return self.of_model(name, action or "revision", revision or "main", body)
        raise Refusal(404, "not here")

    def created(self, asked: dict[str, Any]) -> dict[str, str]:
        owner = asked.get("organization") or USER
        self.check_writes(owner)
        name = f"{owner}/{asked['name']}"
        if name in self.hub.repositories:
            raise Refusal(409, name)
        self.hub.make(name, private=asked.get("private") is True or asked.get("visibility") == "private")
        return {"url": f"{self.hub.address}/{name}"}

    def of_model(self, name: str, action: str, revision: str, body: bytes) -> Any:
        repository = self.repository(name)
        if action in ("branch", "preupload", "commit"):
            self.check_writes(name.partition("/")[0])
        if action == "branch":
            repository.branches.setdefault(revision, repository.branches["main"])
            return {}
        if action == "preupload":
            files = json.loads(body)["files"]
            return {"files": [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in files]}
        if action == "commit":
            lines = [json.loads(line) for line in body.splitlines()]
            added = [line["value"] for line in lines if line["key"] == "file"]
            own = repository.commit(revision, {file["path"]: base64.b64decode(file["content"]) for file in added})
            return {"commitUrl": f"{self.hub.address}/{name}/commit/{own}", "commitOid": own}
        if action == "refs":
            branches = [{"name": name, "ref": name, "targetCommit": own} for name, own in repository.branches.items()]
            return {"branches": branches, "converts": [], "tags": []}
        files = self.files(repository, revision)
        if action == "tree":
            return [{"type": "file", "path": name, "size": len(own), "oid": "0"} for name, own in files.items()]
        card = files.get("README.md", b"").decode().split("---\n")
        about = yaml.safe_load(card[1]) if len(card) > 1 else {}
        siblings = [{"rfilename": file} for file in files]
        return {"id": name, "sha": "0" * 40, "private": repository.private, "siblings": siblings, "cardData": about}

    def repository(self, name: str) -> Repository:
        repository, knows = self.hub.repositories.get(name), self.knows_user()
        if repository is None or (repository.private and not knows):
            raise Refusal(404 if knows else 401, "RepoNotFound")
        if repository.gated:
            raise Refusal(403, "GatedRepo")
        return repository

    def files(self, repository: Repository, revision: str) -> dict[str, bytes]:
        try:
            return repository.files(revision)
        except KeyError:
            raise Refusal(404, "RevisionNotFound") from None

    def knows_user(self) -> bool:
        return self.headers.get("authorization") == f"Bearer {TOKEN}"

    def check_writes(self, owner: str) -> None:
        if not self.knows_user() or owner != USER:
            raise Refusal(403 if self.knows_user() else 401, "no rights")


@contextmanager
def hub_of_test(monkeypatch: pytest.MonkeyPatch, cache: str, token: str | None = TOKEN) -> Iterator[Hub]:
    """Serve an empty hub, which huggingface_hub's client asks in place of the real one, and a cache of its own."""
    from huggingface_hub import constants, file_download, utils

    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("OfTest", (Handler,), {"hub": hub}))
    hub.address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", hub.address)
    template = f"{hub.address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    for module in (constants, file_download):  # older clients have a copy of it
        monkeypatch.setattr(module, "HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", cache)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    getattr(utils, "reset_sessions", lambda: None)()  # in which older clients remember that they were offline
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", f"{cache}/token")
    monkeypatch.setenv("HF_TOKEN", token or "")
    Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()

"""A hub on this machine: enough of its HTTP interface for the real client, with faults on demand."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "c0ffee" + "0" * 34

Revisions = Mapping[str, tuple[str, Mapping[str, bytes]]]


class Hub(ThreadingHTTPServer):
    """Serves `files` of one repository, of a data set or of a model, and takes commits to the latter. `revisions` maps the
    names of others to their commit and files. `more`: other repositories with their files, of which there is one commit.

    `faults` maps a kind of request (`info`, `tree`, `GET`, `HEAD`) to a list of faults, one of which each such request uses
    up: `500`, `429`, `429 for an hour`, `gated`, `missing`, `truncated`, `wrong size`, `wrong content`, and for files `no
    commit`, `no tag`, `commit outside`, `tag outside`. `answers` maps `info` and `tree` to what is sent instead.
    """

    daemon_threads = True

    def __init__(
        self,
        repository: str,
        files: Mapping[str, bytes],
        token: str | None,
        revisions: Revisions,
        more: Mapping[str, Mapping[str, bytes]],
    ):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.more = more
        self.repository, self.files, self.token = repository, dict(files), token
        self.commits = {COMMIT: self.files, **dict(revisions.values())}
        self.names = {None: COMMIT, "main": COMMIT, **{name: commit for name, (commit, _) in revisions.items()}}
        self.faults: dict[str, list[str]] = {}
        self.answers: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.created: dict[str, object] = {}

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


@contextmanager
def hub(
    repository: str,
    files: Mapping[str, bytes],
    token: str | None = None,
    revisions: Revisions | None = None,
    more: Mapping[str, Mapping[str, bytes]] | None = None,
) -> Iterator[Hub]:
    """A running hub, shut down at the end."""
    server = Hub(repository, files, token, revisions or {}, more or {})
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        hub, path = self.server, unquote(urlsplit(self.path).path)
        assert isinstance(hub, Hub)
        content = self.rfile.read(int(self.headers.get("content-length", 0)))
        hub.requests.append(f"POST {path}")
        if self.headers.get("authorization") != f"Bearer {hub.token}":
            return self._send(401, b'{"error": "Invalid username or password."}')
        if path == "/api/repos/create":
            asked = json.loads(content)
            hub.created = asked
            return self._send(200, json.dumps({"url": f"{hub.url}/{hub.repository}"}).encode())
        if path == "/api/validate-yaml":
            return self._send(200, b'{"errors": [], "warnings": []}')
        if path.startswith(f"/api/models/{hub.repository}/preupload/"):
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                for file in json.loads(content)["files"]
            ]
            return self._send(200, json.dumps({"files": files}).encode())
        if path.startswith(f"/api/models/{hub.repository}/commit/"):
            for line in content.splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    hub.files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
            answer = {"commitUrl": f"{hub.url}/{hub.repository}/commit/{COMMIT}", "commitOid": COMMIT}
            return self._send(200, json.dumps(answer).encode())
        return self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"})

    def _answer(self) -> None:
        hub, path = self.server, unquote(urlsplit(self.path).path)
        assert isinstance(hub, Hub)
        other = next((name for name in hub.more if name in path), None)
        repository = other or hub.repository
        commits = hub.commits if other is None else {COMMIT: hub.more[other]}
        prefix = f"/api/datasets/{repository}"
        kind = "tree" if "/tree/" in path else "info" if path.startswith("/api/") else self.command
        hub.requests.append(f"{kind} {path}")
        fault = hub.faults[kind].pop(0) if hub.faults.get(kind) else None
        if fault in ("429", "500"):
            return self._send(int(fault), b"{}")
        if fault == "429 for an hour":
            return self._send(429, b"{}", {"Retry-After": "3600"})
        if kind in hub.answers:
            return self._send(200, hub.answers[kind])
        if fault == "gated":
            return self._send(403, b"{}", {"X-Error-Code": "GatedRepo"})
        if hub.token is not None and self.headers.get("authorization") != f"Bearer {hub.token}":
            return self._send(401, b"{}", {"X-Error-Code": "RepoNotFound"})
        if fault == "missing" or repository not in path:
            return self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        if kind == "info":
            _, named, revision = path.partition("/revision/")
            commit = revision if revision in commits else hub.names.get(revision if named else None)
            if commit is None:
                return self._send(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
            return self._send(200, json.dumps({"id": repository, "sha": commit}).encode())
        if kind == "tree":
            commit, _, folder = path.removeprefix(f"{prefix}/tree/").partition("/")
            start = f"{folder}/" if folder else ""
            inside = [file for file in commits[commit].items() if file[0].startswith(start)]
            if folder and not inside:
                return self._send(404, b"{}", {"X-Error-Code": "EntryNotFound"})
            entries = [_entry(*file) for file in inside]
            if parse_qs(urlsplit(self.path).query).get("recursive", [""])[0].lower() != "true":
                # What lies in folders is listed as these folders.
                names = [path.removeprefix(start).partition("/") for path, _ in inside]
                folders = {f"{start}{name}" for name, slash, _ in names if slash}
                entries = [entry for entry, (_, slash, _) in zip(entries, names, strict=True) if not slash]
                entries += [{"type": "directory", "path": one, "oid": "0" * 40, "size": 0} for one in sorted(folders)]
            return self._send(200, json.dumps(entries).encode())
        commit, _, name = path.split("/resolve/", 1)[-1].partition("/")
        files = commits.get(hub.names.get(commit, commit), hub.files)
        if name not in files:
            return self._send(404, b"{}", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
        return self._send_file(files[name], hub.names.get(commit, commit), fault)

    def _send_file(self, content: bytes, commit: str, fault: str | None) -> None:
        headers = {"X-Repo-Commit": commit, "ETag": f'"{hashlib.sha256(content).hexdigest()}"'}
        if fault in ("no commit", "no tag"):
            del headers["ETag" if fault == "no tag" else "X-Repo-Commit"]
        if fault in ("commit outside", "tag outside"):
            headers["ETag" if fault == "tag outside" else "X-Repo-Commit"] = "../../outside"
        if fault == "wrong size":
            content = content[:-3]
        if fault == "wrong content":
            content = bytes(len(content))
        if fault == "truncated":
            self.send_response(200)
            for name, value in {**headers, "Content-Length": str(len(content))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content[: len(content) // 2])
            self.close_connection = True
            return
        self._send(200, content, headers)

    def _send(self, status: int, body: bytes, headers: Mapping[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def _entry(path: str, content: bytes) -> dict[str, object]:
    digest = hashlib.sha256(content).hexdigest()
    lfs = {"oid": digest, "size": len(content), "pointerSize": 100}
    return {"type": "file", "path": path, "size": len(content), "oid": digest[:40], "lfs": lfs}

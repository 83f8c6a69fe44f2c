"""A Hub on this machine, for tests: what huggingface_hub's own client speaks when it pushes and loads models.

usage: python hub_server.py FOLDER   prints its address, then serves until it is ended.

It keeps repositories and collections in FOLDER (state.json, objects/). The token `owner` may write below `owner/`,
`reader` may read; private repositories are hidden from everybody else. Safetensors and larger binary files go through
LFS: in one part, or from PART bytes on in several, as the Hub asks of large ones.

A test can make it fail: POST /_test/fail {"match": REGEX on "METHOD PATH", "times": N, "status": 500, "after": BYTES}.
With `after` the connection is cut when so many bytes of the body have come. GET /_test/log lists the requests;
POST /_test/reset forgets everything.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

TOKENS = {"owner": True, "reader": False}  # token -> may write below owner/
PART = 64 * 1024
ATTRIBUTES = b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"


class Refused(Exception):
    """An answer that is no success: status, the Hub's X-Error-Code, words."""

    def __init__(self, status: int, code: str = "", words: str = "") -> None:
        super().__init__(words or code)
        self.status, self.code, self.words = status, code, words or code


class Hub:
    """Repositories, as git would have them: objects by hash, commits as {path: entry}, branches."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.lock = folder, threading.RLock()
        (folder / "objects").mkdir(parents=True, exist_ok=True)
        state = folder / "state.json"
        self.state: dict[str, Any] = json.loads(state.read_text()) if state.exists() else {"repos": {}, "sets": {}}
        self.failures: list[dict[str, Any]] = []
        self.log: list[str] = []

    def save(self) -> None:
        temporary = self.folder / "state.tmp"
        temporary.write_text(json.dumps(self.state, indent=1))
        temporary.replace(self.folder / "state.json")

    def object(self, oid: str) -> Path:
        return self.folder / "objects" / oid

    def put(self, data: bytes, lfs: bool) -> dict[str, Any]:
        """Store a file; its entry."""
        oid = hashlib.sha256(data).hexdigest() if lfs else hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
        self.object(oid).write_bytes(data)
        return {"oid": oid, "size": len(data), "lfs": lfs}

    def create(self, name: str, private: bool) -> None:
        with self.lock:
            self.state["repos"][name] = {"private": private, "refs": {}, "commits": {}, "log": []}
            self.commit(name, "main", {".gitattributes": self.put(ATTRIBUTES, lfs=False)}, "initial commit")

    def commit(self, name: str, branch: str, files: dict[str, Any], title: str) -> str:
        """`files` is the whole tree afterwards."""
        repo = self.state["repos"][name]
        parent = repo["refs"].get(branch, "")
        oid = hashlib.sha1(json.dumps([parent, branch, files, title, len(repo["log"])]).encode()).hexdigest()
        repo["commits"][oid] = files
        repo["refs"][branch] = oid
        repo["log"].append({"id": oid, "title": title, "branch": branch})
        self.save()
        return oid

    def repo(self, name: str, token: str | None) -> dict[str, Any]:
        repo = self.state["repos"].get(name)
        if repo is None or (repo["private"] and token not in TOKENS):
            raise Refused(401 if token is None else 404, "RepoNotFound", "Repository not found")
        return repo

    def tree(self, name: str, revision: str, token: str | None) -> tuple[str, dict[str, Any]]:
        """Commit and files of a branch or commit."""
        repo = self.repo(name, token)
        oid = repo["refs"].get(revision, revision)
        if oid not in repo["commits"]:
            raise Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return oid, repo["commits"][oid]


def entry(path: str, held: dict[str, Any]) -> dict[str, Any]:
    """A file as the tree endpoint tells of it."""
    told = {"type": "file", "path": path, "size": held["size"], "oid": held["oid"]}
    if held["lfs"]:
        told["lfs"] = {"oid": held["oid"], "size": held["size"], "pointerSize": 132}
    return told


class Handler(BaseHTTPRequestHandler):
    """One request."""

    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing on stderr."""

    def handle_any(self) -> None:
        url = urlsplit(self.path)
        self.query = parse_qs(url.query)
        said = f"{self.command} {unquote(url.path)}"
        failure = None
        if not url.path.startswith("/_test/"):
            self.hub.log.append(said)
            with self.hub.lock:
                failure = next((f for f in self.hub.failures if f["times"] > 0 and re.search(f["match"], said)), None)
                if failure is not None:
                    failure["times"] -= 1
        length = int(self.headers.get("Content-Length") or 0)
        if failure is not None and "after" in failure:
            self.rfile.read(min(length, failure["after"]))
            self.close_connection = True
            self.connection.shutdown(2)
            return
        self.body = self._chunked() if self.headers.get("Transfer-Encoding") == "chunked" else self.rfile.read(length)
        if failure is not None:
            self.answer({"error": "injected"}, failure["status"], {"Retry-After": "0"})
            return
        authorization = self.headers.get("Authorization") or ""
        self.token = authorization.removeprefix("Bearer ") or None
        try:
            for method, pattern, work in ROUTES:
                found = re.fullmatch(pattern, url.path)
                if found and self.command in method:
                    work(self, *(unquote(part or "") for part in found.groups()))
                    return
            raise Refused(404, words=f"the test Hub has no {said}")
        except Refused as refused:
            headers = {"X-Error-Message": refused.words} | ({"X-Error-Code": refused.code} if refused.code else {})
            self.answer({"error": refused.words}, refused.status, headers)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = handle_any

    def _chunked(self) -> bytes:
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def answer(self, value: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        data = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        for name, text in ({"Content-Length": str(len(data))} | (headers or {})).items():
            self.send_header(name, text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def need_write(self, name: str) -> None:
        if self.token not in TOKENS:
            raise Refused(401, words="Invalid username or password.")
        if not TOKENS[self.token] or not name.startswith("owner/"):
            raise Refused(403, words=f"Forbidden: you must have write access to {name}")

    @property
    def address(self) -> str:
        return f"http://{self.headers['Host']}"

    # What is asked.

    def fail(self) -> None:
        self.hub.failures.append({"times": 1, **json.loads(self.body)})
        self.answer({})

    def reset(self) -> None:
        with self.hub.lock:
            for path in (self.hub.folder / "objects").iterdir():
                path.unlink()
            self.hub.state, self.hub.failures, self.hub.log = {"repos": {}, "sets": {}}, [], []
            self.hub.save()
        self.answer({})

    def requests(self) -> None:
        self.answer(self.hub.log)

    def whoami(self) -> None:
        if self.token not in TOKENS:
            raise Refused(401, words="Invalid credentials in Authorization header")
        self.answer({"type": "user", "name": self.token, "orgs": [], "auth": {"type": "access_token"}})

    def create(self) -> None:
        asked = json.loads(self.body)
        name = f"{asked.get('organization') or self.token}/{asked['name']}"
        self.need_write(name)
        made = {"url": f"{self.address}/{name}", "name": name}
        if name in self.hub.state["repos"]:
            self.answer(made | {"error": "You already created this model repo"}, 409)
            return
        self.hub.create(name, asked.get("visibility") == "private")
        self.answer(made)

    def check_card(self) -> None:
        asked = json.loads(self.body)
        wrong = [] if asked["content"].startswith("---\n") else [{"message": "empty or missing yaml metadata"}]
        self.answer({"errors": [], "warnings": wrong})

    def info(self, name: str, revision: str = "main") -> None:
        oid, files = self.hub.tree(name, revision, self.token)
        siblings = [{"rfilename": path} for path in files]
        private = self.hub.state["repos"][name]["private"]
        self.answer({"_id": "1", "id": name, "modelId": name, "sha": oid, "private": private, "siblings": siblings})

    def list_tree(self, name: str, revision: str, below: str = "") -> None:
        _, files = self.hub.tree(name, revision, self.token)
        self.answer([entry(path, held) for path, held in files.items() if path.startswith(below)])

    def refs(self, name: str) -> None:
        held = self.hub.repo(name, self.token)["refs"].items()
        branches = [{"name": name, "ref": f"refs/heads/{name}", "targetCommit": oid} for name, oid in held]
        self.answer({"branches": branches, "converts": [], "tags": []})

    def commits(self, name: str, revision: str) -> None:
        log = [c for c in self.hub.repo(name, self.token)["log"] if c["branch"] == revision]
        date = "2026-01-01T00:00:00.000Z"
        self.answer([{"id": c["id"], "title": c["title"], "message": "", "date": date, "authors": []} for c in log])

    def branch(self, name: str, branch: str) -> None:
        self.need_write(name)
        repo = self.hub.repo(name, self.token)
        if branch in repo["refs"]:
            raise Refused(409, words=f"Reference already exists: {branch}")
        start = (json.loads(self.body) if self.body else {}).get("startingPoint", "main")
        with self.hub.lock:
            repo["refs"][branch], _ = self.hub.tree(name, start, self.token)
            self.hub.save()
        self.answer({})

    def preupload(self, name: str, revision: str) -> None:
        self.need_write(name)
        _, files = self.hub.tree(name, revision, self.token)
        told = []
        for file in json.loads(self.body)["files"]:
            large = file["size"] >= 1024 or file["path"].endswith(".safetensors")
            text = b"\0" not in base64.b64decode(file["sample"])
            mode = "lfs" if file["path"].endswith(".safetensors") or (large and not text) else "regular"
            held = files.get(file["path"])
            known = {"oid": held["oid"]} if held else {}
            told.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, **known})
        self.answer({"files": told})

    def batch(self, name: str) -> None:
        self.need_write(name)
        told = []
        for wanted in json.loads(self.body)["objects"]:
            oid, size = wanted["oid"], wanted["size"]
            action: dict[str, Any] = {"oid": oid, "size": size}
            if not self.hub.object(oid).exists():
                there = f"{self.address}/_lfs/{oid}"
                upload: dict[str, Any] = {"href": there}
                if size >= PART:
                    parts = range(1, -(-size // PART) + 1)
                    upload = {"href": f"{there}/complete", "header": {"chunk_size": str(PART)}}
                    upload["header"] |= {str(part): f"{there}/{part}" for part in parts}
                action["actions"] = {"upload": upload, "verify": {"href": f"{there}/verify"}}
            told.append(action)
        self.answer({"transfer": "basic", "objects": told})

    def upload(self, oid: str, part: str = "") -> None:
        target = self.hub.object(f"{oid}.{part}" if part else oid)
        if not part and hashlib.sha256(self.body).hexdigest() != oid:
            raise Refused(400, words="the content has another hash")
        target.write_bytes(self.body)
        self.answer(b"", headers={"ETag": hashlib.md5(self.body).hexdigest()})

    def complete(self, oid: str) -> None:
        parts = [self.hub.object(f"{oid}.{part['partNumber']}") for part in json.loads(self.body)["parts"]]
        data = b"".join(part.read_bytes() for part in parts)
        if hashlib.sha256(data).hexdigest() != oid:
            raise Refused(400, words="the parts have another hash")
        self.hub.object(oid).write_bytes(data)
        self.answer({})

    def verify(self, oid: str) -> None:
        if self.hub.object(oid).stat().st_size != json.loads(self.body)["size"]:
            raise Refused(400, words="the object has another size")
        self.answer({})

    def commit(self, name: str, revision: str) -> None:
        self.need_write(name)
        lines = [json.loads(line) for line in self.body.splitlines()]
        with self.hub.lock:
            parent, before = self.hub.tree(name, revision, self.token)
            files, title = dict(before), ""
            for line in lines:
                key, value = line["key"], line["value"]
                if key == "header":
                    title = value["summary"]
                    if value.get("parentCommit") not in (None, parent):
                        raise Refused(412, words="A commit has happened since. Please refresh and try again.")
                elif key == "file":
                    files[value["path"]] = self.hub.put(base64.b64decode(value["content"]), lfs=False)
                elif key == "lfsFile":
                    if not self.hub.object(value["oid"]).exists():
                        raise Refused(400, words=f"LFS pointer pointed to a file that does not exist: {value['path']}")
                    size = self.hub.object(value["oid"]).stat().st_size
                    files[value["path"]] = {"oid": value["oid"], "size": size, "lfs": True}
                elif key == "deletedFile":
                    del files[value["path"]]
            oid = self.hub.commit(name, revision, files, title)
        self.answer(
            {"success": True, "commitOid": oid, "commitUrl": f"{self.address}/{name}/commit/{oid}", "hookOutput": ""}
        )

    def resolve(self, name: str, revision: str, path: str) -> None:
        oid, files = self.hub.tree(name, revision, self.token)
        commit = {"X-Repo-Commit": oid}
        if path not in files:
            self.answer({"error": "Entry not found"}, 404, {"X-Error-Code": "EntryNotFound", **commit})
            return
        held = files[path]
        headers = {"ETag": f'"{held["oid"]}"', "X-Linked-Etag": f'"{held["oid"]}"', "Accept-Ranges": "bytes", **commit}
        data = self.hub.object(held["oid"]).read_bytes()
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if asked and self.command == "GET":
            start, stop = int(asked[1]), int(asked[2] or len(data) - 1) + 1
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(data)}"
            self.answer(data[start:stop], 206, headers)
            return
        self.answer(data, headers={**headers, "X-Linked-Size": str(len(data))})

    def new_collection(self) -> None:
        asked = json.loads(self.body)
        self.need_write(f"{asked['namespace']}/")
        slug = f"{asked['namespace']}/{re.sub('[^a-z0-9]+', '-', asked['title'].lower())}-0123456789abcdef01234567"
        if slug in self.hub.state["sets"]:
            self.answer({"slug": slug, "error": "exists"}, 409)
            return
        owner = {"name": asked["namespace"], "type": "user"}
        self.hub.state["sets"][slug] = {
            **{"slug": slug, "title": asked["title"], "owner": owner, "items": [], "position": 0, "theme": "blue"},
            **{"lastUpdated": "2026-01-01T00:00:00.000Z", "private": asked["private"], "upvotes": 0},
        }
        self.collection(slug)

    def collection(self, slug: str) -> None:
        if slug not in self.hub.state["sets"]:
            raise Refused(404, words="Collection not found")
        self.hub.save()
        self.answer(self.hub.state["sets"][slug])

    def add_item(self, slug: str) -> None:
        self.need_write(slug)
        if slug not in self.hub.state["sets"]:
            raise Refused(404, words="Collection not found")
        items, asked = self.hub.state["sets"][slug]["items"], json.loads(self.body)["item"]
        if any(item["id"] == asked["id"] for item in items):
            raise Refused(409, words="Item already in the collection")
        items.append({"_id": str(len(items)), "id": asked["id"], "type": asked["type"], "position": len(items)})
        self.collection(slug)


REPO, REST = r"([^/]+/[^/]+)", r"(.+)"
ROUTES: list[tuple[tuple[str, ...], str, Any]] = [
    (("POST",), r"/_test/fail", Handler.fail),
    (("POST",), r"/_test/reset", Handler.reset),
    (("GET",), r"/_test/log", Handler.requests),
    (("GET",), r"/api/whoami-v2", Handler.whoami),
    (("POST",), r"/api/repos/create", Handler.create),
    (("POST",), r"/api/validate-yaml", Handler.check_card),
    (("POST",), r"/api/collections", Handler.new_collection),
    (("POST",), rf"/api/collections/{REPO}/items", Handler.add_item),
    (("GET",), rf"/api/collections/{REPO}", Handler.collection),
    (("GET",), rf"/api/models/{REPO}", Handler.info),
    (("GET",), rf"/api/models/{REPO}/revision/([^/]+)", Handler.info),
    (("GET",), rf"/api/models/{REPO}/tree/([^/]+)(?:/(.*))?", Handler.list_tree),
    (("GET",), rf"/api/models/{REPO}/refs", Handler.refs),
    (("GET",), rf"/api/models/{REPO}/commits/([^/]+)", Handler.commits),
    (("POST",), rf"/api/models/{REPO}/branch/([^/]+)", Handler.branch),
    (("POST",), rf"/api/models/{REPO}/preupload/([^/]+)", Handler.preupload),
    (("POST",), rf"/api/models/{REPO}/commit/([^/]+)", Handler.commit),
    (("POST",), rf"/{REPO}\.git/info/lfs/objects/batch", Handler.batch),
    (("PUT",), r"/_lfs/([0-9a-f]+)", Handler.upload),
    (("PUT",), r"/_lfs/([0-9a-f]+)/(\d+)", Handler.upload),
    (("POST",), r"/_lfs/([0-9a-f]+)/complete", Handler.complete),
    (("POST",), r"/_lfs/([0-9a-f]+)/verify", Handler.verify),
    (("GET", "HEAD"), rf"/{REPO}/resolve/([^/]+)/{REST}", Handler.resolve),
]


def main(folder: str) -> None:
    """Serve until ended; the address is the first line of stdout."""
    Handler.hub = Hub(Path(folder))
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    print(f"http://127.0.0.1:{server.server_address[1]}", flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main(sys.argv[1])

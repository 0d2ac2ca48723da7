"""A Hugging Face Hub in one file: the routes that `huggingface_hub` calls to load and to push, on 127.0.0.1.

Point a fresh process at it with `HF_ENDPOINT` (the library reads the variable when it is imported). It speaks the real
protocol to the real client; what it leaves out is accounts, LFS and Xet: every file travels inside the commit.
"""

import base64
import hashlib
import json
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit


class Hub:
    """Repositories as {(kind, name): {path: bytes}} with kind "models", "datasets" or "spaces", served at `url`.

    requests: every (method, path) it was asked, in order.
    commits: (repository name, first line of the message, sorted paths) of every push.
    index: what `GET /pypi/diffusers/json` answers: the releases the community route chooses its folder by.
    """

    def __init__(self):
        self.repos, self.requests, self.commits, self.index = {}, [], [], {"releases": {}}
        self.url = ""

    def add(self, name, files, kind="models"):
        """Create or replace a repository from {path: bytes}, or from a folder."""
        if isinstance(files, Path):
            files = {p.relative_to(files).as_posix(): p.read_bytes() for p in sorted(files.rglob("*")) if p.is_file()}
        self.repos[kind, name] = dict(files)

    def sha(self, kind, name):
        digest = hashlib.sha1()
        for path, data in sorted(self.repos[kind, name].items()):
            digest.update(path.encode() + b"\0" + data)
        return digest.hexdigest()

    @contextmanager
    def running(self):
        server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Handler,), {"hub": self}))
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        self.url = f"http://127.0.0.1:{server.server_port}"
        try:
            yield self
        finally:
            server.shutdown()
            server.server_close()
            thread.join()

    def stand_in(self, monkeypatch):
        """While it runs, the Hub of this process, which is signed in."""
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", self.url)
        monkeypatch.setenv("HF_TOKEN", "hf_none")


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *args):
        pass

    def reply(self, body, status=200, headers=None):
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Content-Type", "application/octet-stream" if isinstance(body, bytes) else "application/json")
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def missing(self, code):
        self.reply({"error": code}, 404, {"X-Error-Code": code, "X-Error-Message": code})

    def find(self, kind, name, revision):
        """The files and the commit, or None after having answered 404."""
        files = self.hub.repos.get((kind, name))
        if files is None:
            return self.missing("RepoNotFound")
        sha = self.hub.sha(kind, name)
        if revision not in ("main", sha):
            return self.missing("RevisionNotFound")
        return files, sha

    def do_GET(self):
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append((self.command, path))
        if path == "/pypi/diffusers/json":
            return self.reply(self.hub.index)
        info = re.fullmatch(r"/api/(models|datasets|spaces)/([^/]+/[^/]+)(?:/revision/([^/]+))?", path)
        if info:
            kind, name, revision = info.groups()
            found = self.find(kind, name, revision or "main")
            if found:
                files, sha = found
                siblings = [{"rfilename": file} for file in sorted(files)]
                common = {"private": False, "disabled": False, "gated": False, "downloads": 0, "likes": 0, "tags": []}
                self.reply({"_id": sha, "id": name, "modelId": name, "sha": sha, "siblings": siblings, **common})
            return None
        tree = re.fullmatch(r"/api/(models|datasets|spaces)/([^/]+/[^/]+)/tree/([^/]+)", path)
        if tree:
            found = self.find(*tree.groups())
            if found:
                listed = [
                    {"type": "file", "path": file, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                    for file, data in sorted(found[0].items())
                ]
                self.reply(listed)
            return None
        resolve = re.fullmatch(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        if resolve:
            kind, name, revision, file = resolve.groups()
            found = self.find("datasets" if kind else "models", name, revision)
            if found:
                files, sha = found
                if file not in files:
                    return self.missing("EntryNotFound")
                etag = hashlib.sha1(files[file]).hexdigest()
                self.reply(files[file], headers={"X-Repo-Commit": sha, "ETag": f'"{etag}"'})
            return None
        self.missing("EntryNotFound")

    do_HEAD = do_GET

    def do_POST(self):
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append((self.command, path))
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if path == "/api/validate-yaml":
            return self.reply({"errors": [], "warnings": []})
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization') or 'user'}/{asked['name']}"
            self.hub.repos.setdefault((f"{asked.get('type') or 'model'}s", name), {})
            return self.reply({"url": f"{self.hub.url}/{name}", "name": name, "id": name})
        preupload = re.fullmatch(r"/api/(models|datasets|spaces)/([^/]+/[^/]+)/preupload/([^/]+)", path)
        if preupload:
            asked = json.loads(body)["files"]
            return self.reply(
                {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in asked]}
            )
        commit = re.fullmatch(r"/api/(models|datasets|spaces)/([^/]+/[^/]+)/commit/([^/]+)", path)
        if commit and (commit[1], commit[2]) in self.hub.repos:
            message, pushed = "", []
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "header":
                    message = line["value"]["summary"]
                elif line["key"] == "file":
                    assert line["value"]["encoding"] == "base64"
                    pushed.append(line["value"]["path"])
                    data = base64.b64decode(line["value"]["content"])
                    self.hub.repos[commit[1], commit[2]][pushed[-1]] = data
            self.hub.commits.append((commit[2], message, sorted(pushed)))
            sha = self.hub.sha(commit[1], commit[2])
            return self.reply(
                {"success": True, "commitOid": sha, "commitUrl": f"{self.hub.url}/{commit[2]}/commit/{sha}"}
            )
        self.missing("RepoNotFound")

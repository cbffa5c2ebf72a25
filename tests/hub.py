"""A hub on 127.0.0.1: the part of its HTTP protocol that pushes a model, and downloads it again."""

import base64
import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml

USER, TOKEN = "somebody", "hf_aVerySecretToken"
IDENTIFIER = re.compile(r"[\w.-]+/[\w.-]+")
LARGE = (".safetensors", ".pt", ".pth", ".bin")  # what the hub's .gitattributes sends to LFS


class Hub(ThreadingHTTPServer):
    """Keeps repositories in memory: `files` of each by path, and `commits`, the messages in their order."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.files: dict[str, dict[str, bytes]] = {}
        self.commits: dict[str, list[str]] = {}
        self.objects: dict[str, bytes] = {}

    def environment(self) -> dict[str, str]:
        """What a process has to have in its environment, to take this for the hub and to be on line."""
        on_line = dict.fromkeys(("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE"), "0")
        return {"HF_ENDPOINT": self.url, "HF_HUB_DISABLE_XET": "1", **on_line}


@contextmanager
def running() -> Iterator[Hub]:
    """A hub as long as it lasts."""
    hub = Hub()
    thread = Thread(target=hub.serve_forever)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        thread.join()
        hub.server_close()


class Handler(BaseHTTPRequestHandler):
    """Answers one client's requests."""

    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def _say(self, status: int, content: bytes | dict | list = b"", **headers: str) -> None:
        content = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _absent(self, what: str) -> None:
        self._say(404, {"error": f"{what} not found"}, X_Error_Code=f"{what}NotFound")

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers["Content-Length"]))

    def _revision(self, repo: str) -> str:
        return hashlib.sha1(f"{repo}{len(self.server.commits[repo])}".encode()).hexdigest()

    # ------------------------------------------------------------------------------------------------------- reading
    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        if found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)", path):
            self._file(*found.groups())
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/[^/]+)?", path):
            self._describe(found[1])
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/[^/]+/?(.*)", path):
            self._list(*found.groups())
        else:
            self._absent("Entry")

    def _file(self, repo: str, name: str) -> None:
        content = self.server.files.get(repo, {}).get(name)
        if content is None:
            return self._absent("Entry" if repo in self.server.files else "Repo")
        etag = f'"{hashlib.sha256(content).hexdigest()}"'
        self._say(200, content, X_Repo_Commit=self._revision(repo), ETag=etag)

    def _describe(self, repo: str) -> None:
        if repo not in self.server.files:
            return self._absent("Repo")
        names = [{"rfilename": name} for name in self.server.files[repo]]
        self._say(200, {"id": repo, "sha": self._revision(repo), "private": False, "siblings": names})

    def _list(self, repo: str, folder: str) -> None:
        inside = {
            n: c for n, c in self.server.files.get(repo, {}).items() if n.startswith(f"{folder}/" if folder else "")
        }
        if not inside:
            return self._absent("Entry")
        self._say(
            200,
            [
                {"type": "file", "path": n, "size": len(c), "oid": hashlib.sha1(c).hexdigest()}
                for n, c in inside.items()
            ],
        )

    # ------------------------------------------------------------------------------------------------------- writing
    def do_PUT(self) -> None:
        content = self._body()
        if self.path != f"/lfs/{hashlib.sha256(content).hexdigest()}":
            return self._say(400, {"error": "not the content that was announced"})
        self.server.objects[self.path.removeprefix("/lfs/")] = content
        self._say(200)

    def do_POST(self) -> None:
        body, path = self._body(), unquote(urlsplit(self.path).path)
        if path == "/api/validate-yaml":
            return self._validate(json.loads(body)["content"])
        if self.headers["Authorization"] != f"Bearer {TOKEN}":
            return self._say(401, {"error": "Invalid username or password."})
        if path == "/api/repos/create":
            self._create(json.loads(body))
        elif re.fullmatch(r"/api/models/[^/]+/[^/]+/preupload/main", path):
            modes = {True: "lfs", False: "regular"}
            files = [file["path"] for file in json.loads(body)["files"]]
            answers = [{"path": p, "uploadMode": modes[p.endswith(LARGE)], "shouldIgnore": False} for p in files]
            self._say(200, {"files": answers})
        elif path.endswith(".git/info/lfs/objects/batch"):
            wanted = [(o["oid"], o["size"]) for o in json.loads(body)["objects"]]
            places = {oid: {"upload": {"href": f"{self.server.url}/lfs/{oid}"}} for oid, _ in wanted}
            objects = [{"oid": oid, "size": size, "actions": places[oid]} for oid, size in wanted]
            self._say(200, {"transfer": "basic", "objects": objects})
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/main", path):
            self._commit(found[1], [json.loads(line) for line in body.splitlines() if line])
        else:
            self._absent("Entry")

    def _create(self, asked: dict[str, Any]) -> None:
        repo = f"{asked.get('organization') or USER}/{asked['name']}"
        status = 409 if repo in self.server.files else 200
        self.server.files.setdefault(repo, {})
        self.server.commits.setdefault(repo, [])
        self._say(status, {"url": f"{self.server.url}/{repo}", "id": repo})

    def _validate(self, card: str) -> None:
        """As the hub does, a name of a base model that cannot be one is an error."""
        metadata = yaml.safe_load(card.split("---\n")[1])
        names = metadata.get("base_model") or []
        wrong = [name for name in ([names] if isinstance(names, str) else names) if not IDENTIFIER.fullmatch(name)]
        errors = [{"message": f'"base_model" with value "{name}" is not valid'} for name in wrong]
        self._say(400 if errors else 200, {"errors": errors, "warnings": []})

    def _commit(self, repo: str, lines: list[dict[str, Any]]) -> None:
        files, summary = self.server.files[repo], lines[0]["value"]["summary"]
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.server.objects[value["oid"]]
            else:
                return self._say(400, {"error": f"{line['key']} is not known here"})
        self.server.commits[repo].append(summary)
        oid = self._revision(repo)
        self._say(200, {"success": True, "commitOid": oid, "commitUrl": f"{self.server.url}/{repo}/commit/{oid}"})

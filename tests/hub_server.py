"""The Hub's HTTP interface as far as a push and a load use it, on loopback: what was pushed is kept by revision.

Tokens, owners and visibility count as they do on the Hub; faults are armed by setting an attribute.
"""

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import yaml


@dataclass
class Commit:
    message: str
    files: dict[str, bytes]
    large: frozenset[str]  # names that were uploaded, the others came within the commit
    parent: str | None

    @property
    def oid(self) -> str:
        digest = hashlib.sha1(f"{self.parent} {self.message}".encode())
        for name, content in sorted(self.files.items()):
            digest.update(name.encode() + hashlib.sha1(content).digest())
        return digest.hexdigest()


@dataclass
class Repository:
    owner: str
    private: bool = False
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)

    def add(self, branch: str, commit: Commit) -> str:
        self.commits[commit.oid] = commit
        self.branches[branch] = commit.oid
        return commit.oid

    def files(self, revision: str = "main") -> dict[str, bytes]:
        return self.commits[self.branches.get(revision, revision)].files

    def history(self, branch: str = "main") -> list[str]:
        """The messages of a branch, newest first."""
        found, oid = [], self.branches[branch]
        while oid is not None:
            found.append(self.commits[oid].message)
            oid = self.commits[oid].parent
        return found


class Hub:
    """`with Hub({"token": "user"}) as hub:` serves at hub.address until the block ends."""

    def __init__(self, tokens: dict[str, str]):
        self.tokens = tokens
        self.repositories: dict[str, Repository] = {}
        self.large: dict[str, bytes] = {}  # uploads by their SHA-256, waiting for a commit or in one
        self.requests: list[tuple[str, str]] = []
        self.bodies: list[bytes] = []
        self.drop_uploads = False  # an upload's connection ends in its middle
        self.broken: int | None = None  # every commit is answered by this status
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (_Handler,), {"hub": self}))

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def create(self, name: str, owner: str, private: bool = False) -> Repository:
        made = self.repositories[name] = Repository(owner, private)
        made.add("main", Commit("initial commit", {".gitattributes": b"*.safetensors filter=lfs\n"}, frozenset(), None))
        return made

    def stored(self) -> bytes:
        """Everything that was sent here or is kept here, in a row."""
        commits = [commit for repository in self.repositories.values() for commit in repository.commits.values()]
        return b"\n".join(
            [
                *self.bodies,
                *self.large.values(),
                *(commit.message.encode() for commit in commits),
                *(content for commit in commits for content in commit.files.values()),
            ]
        )

    def __enter__(self):
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error):
        self._server.shutdown()
        self._server.server_close()


class _Refused(Exception):
    """An answer that is no success; the Hub names some of its errors in a header."""

    def __init__(self, status: int, message: str, code: str = "", **more: str):
        super().__init__(message)
        self.status, self.code, self.more = status, code, more


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # head and body of an answer leave together: apart, the second waits for the first to be confirmed
    hub: Hub

    def answer(self):
        path = urlsplit(self.path).path
        self.hub.requests.append((self.command, path))
        body = self._body()
        if body is None:
            self.close_connection = True
            return
        if not path.startswith("/upload/"):
            self.hub.bodies.append(body)
        try:
            for method, pattern, handle in ROUTES:
                match = re.fullmatch(pattern, path)
                if match and self.command in method.split():
                    self._send(200, *handle(self, body, **_unquoted(match)))
                    return
            raise _Refused(404, f"no such address: {self.command} {path}")
        except _Refused as refused:
            headers = {"X-Error-Message": str(refused)} | ({"X-Error-Code": refused.code} if refused.code else {})
            self._send(refused.status, json.dumps({"error": str(refused)} | refused.more).encode(), headers)

    do_GET = do_HEAD = do_POST = do_PUT = answer

    def log_message(self, *words):
        """Silence: the tests read what is answered."""

    # Who may what

    def user(self) -> str | None:
        given = self.headers.get("Authorization")
        if given is None:
            return None
        user = self.hub.tokens.get(given.removeprefix("Bearer "))
        if user is None:
            raise _Refused(401, "Invalid credentials in Authorization header")
        return user

    def readable(self, name: str) -> Repository:
        repository, user = self.hub.repositories.get(name), self.user()
        if repository is None or (repository.private and repository.owner != user):
            raise _Refused(404 if user else 401, "Repository not found", "RepoNotFound")
        return repository

    def writable(self, name: str) -> Repository:
        repository = self.readable(name)
        if self.user() is None:
            raise _Refused(401, "Invalid username or password.")
        if repository.owner != self.user():
            raise _Refused(403, "Forbidden: you must use a write token to upload to a repository")
        return repository

    def commit_at(self, name: str, revision: str) -> Commit:
        repository = self.readable(name)
        oid = repository.branches.get(revision, revision)
        if oid not in repository.commits:
            raise _Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return repository.commits[oid]

    # Writing

    def create(self, body):
        given, user = json.loads(body), self.user()
        if user is None:
            raise _Refused(401, "Invalid username or password.")
        owner = given.get("organization") or user
        name = f"{owner}/{given['name']}"
        if owner != user:
            raise _Refused(403, f'You don\'t have the rights to create a model under the namespace "{owner}"')
        if name in self.hub.repositories:
            raise _Refused(409, "You already created this model repo", url=f"{self.hub.address}/{name}")
        self.hub.create(name, user, given.get("visibility") == "private" or given.get("private", False))
        return _json({"url": f"{self.hub.address}/{name}"})

    def validate(self, body):
        metadata = _metadata(json.loads(body)["content"])
        if not isinstance(metadata, dict) or not isinstance(metadata.get("license"), str):
            raise _Refused(400, "the metadata is no mapping, or has no license")
        return _json({"errors": [], "warnings": []})

    def preupload(self, body, name, revision):
        self.writable(name)
        commit = self.commit_at(name, revision)
        return _json(
            {
                "files": [
                    {
                        "path": file["path"],
                        "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                        "shouldIgnore": False,
                        "oid": _object_id(commit, file["path"]) if file["path"] in commit.files else None,
                    }
                    for file in json.loads(body)["files"]
                ]
            }
        )

    def batch(self, body, name):
        self.writable(name)
        actions = {
            "upload": lambda oid: {"href": f"{self.hub.address}/upload/{oid}"},
            "verify": lambda oid: {"href": f"{self.hub.address}/{name}.git/verify"},
        }
        return _json(
            {
                "transfer": "basic",
                "objects": [
                    item
                    if item["oid"] in self.hub.large
                    else item | {"actions": {key: made(item["oid"]) for key, made in actions.items()}}
                    for item in json.loads(body)["objects"]
                ],
            }
        )

    def upload(self, body, oid):
        if self.headers.get("Authorization"):
            raise _Refused(400, "the address of an upload is signed and takes no token")
        if hashlib.sha256(body).hexdigest() != oid:
            raise _Refused(400, "the content is not what was announced")
        self.hub.large[oid] = body
        return b"", {}

    def verify(self, body, name):
        self.writable(name)
        given = json.loads(body)
        if len(self.hub.large.get(given["oid"], b"")) != given["size"]:
            raise _Refused(404, "the upload is not here")
        return _json({})

    def commit(self, body, name, revision):
        repository = self.writable(name)
        if self.hub.broken:
            raise _Refused(self.hub.broken, "Service out of order")
        if revision not in repository.branches:
            raise _Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        parent = self.commit_at(name, revision)
        files, large, message = dict(parent.files), set(parent.large), ""
        for line in body.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "header":
                message = value["summary"]
            elif item["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
                large.discard(value["path"])
            elif item["key"] == "lfsFile":
                if value["oid"] not in self.hub.large:
                    raise _Refused(400, f"the upload of {value['path']} is not here")
                files[value["path"]] = self.hub.large[value["oid"]]
                large.add(value["path"])
            elif item["key"] == "deletedFile":
                del files[value["path"]]
                large.discard(value["path"])
            else:
                raise _Refused(400, f"unknown operation {item['key']}")
        oid = repository.add(revision, Commit(message, files, frozenset(large), parent.oid))
        return _json({"commitUrl": f"{self.hub.address}/{name}/commit/{oid}", "commitOid": oid})

    def branch(self, body, name, branch):
        repository = self.writable(name)
        if branch in repository.branches:
            raise _Refused(409, f"Reference already exists: {branch}")
        repository.branches[branch] = repository.branches["main"]
        return _json({})

    # Reading

    def who(self, body):
        user = self.user()
        if user is None:
            raise _Refused(401, "Invalid username or password.")
        return _json({"type": "user", "name": user, "orgs": []})

    def info(self, body, name, revision="main"):
        commit = self.commit_at(name, revision)
        card = _metadata(commit.files.get("README.md", b"").decode())
        return _json(
            {
                "id": name,
                "modelId": name,
                "sha": commit.oid,
                "private": self.readable(name).private,
                "siblings": [{"rfilename": file} for file in sorted(commit.files)],
                "tags": [],
                "cardData": card,
            }
        )

    def tree(self, body, name, revision, folder):
        commit = self.commit_at(name, revision)
        if folder:
            raise _Refused(404, f"{folder} does not exist", "EntryNotFound")  # what is pushed has no folders
        listed = []
        for file, content in sorted(commit.files.items()):
            entry = {"type": "file", "path": file, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
            if file in commit.large:
                entry["lfs"] = {"oid": _object_id(commit, file), "size": len(content), "pointerSize": 134}
            listed.append(entry)
        return _json(listed)

    def resolve(self, body, name, revision, file):
        commit = self.commit_at(name, revision)
        if file not in commit.files:
            raise _Refused(404, "Entry not found", "EntryNotFound")
        content, tag = commit.files[file], f'"{_object_id(commit, file)}"'
        headers = {"X-Repo-Commit": commit.oid, "ETag": tag}
        if file in commit.large:
            headers |= {"X-Linked-ETag": tag, "X-Linked-Size": str(len(content))}
        return content, headers

    # Bytes

    def _body(self) -> bytes | None:
        """The request's body; None where the connection is to end in its middle."""
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            parts = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            body = b"".join(parts)
        else:
            size = int(self.headers.get("Content-Length") or 0)
            body = self.rfile.read(size // 2 if self._is_dropped() else size)
        return None if self._is_dropped() else body

    def _is_dropped(self):
        return self.hub.drop_uploads and self.path.startswith("/upload/")

    def _send(self, status, body, headers):
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), "X-Request-Id": "Root=1-0123-4567", **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def _json(values):
    return json.dumps(values).encode(), {"Content-Type": "application/json"}


def _unquoted(match):
    """The parts of an address; a branch may have slashes, as %2F."""
    return {key: part and unquote(part) for key, part in match.groupdict().items()}


def _metadata(card):
    """What stands between the dashes at the top of a card."""
    block = re.match(r"---\n(.*?)\n---\n", card, flags=re.S)
    return yaml.safe_load(block[1]) if block else None


def _object_id(commit, name):
    """What identifies a file's content: its SHA-256 where it was uploaded, else git's own number."""
    content = commit.files[name]
    if name in commit.large:
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


NAME = r"(?P<name>[^/]+/[^/]+?)"
REVISION = r"(?P<revision>[^/]+)"
ROUTES = [
    ("POST", r"/api/repos/create", _Handler.create),
    ("POST", r"/api/validate-yaml", _Handler.validate),
    ("GET", r"/api/whoami-v2", _Handler.who),
    ("POST", rf"/api/models/{NAME}/preupload/{REVISION}", _Handler.preupload),
    ("POST", rf"/api/models/{NAME}/commit/{REVISION}", _Handler.commit),
    ("POST", rf"/api/models/{NAME}/branch/(?P<branch>[^/]+)", _Handler.branch),
    ("POST", rf"/{NAME}\.git/info/lfs/objects/batch", _Handler.batch),
    ("POST", rf"/{NAME}\.git/verify", _Handler.verify),
    ("PUT", r"/upload/(?P<oid>[0-9a-f]{64})", _Handler.upload),
    ("GET", rf"/api/models/{NAME}/revision/{REVISION}", _Handler.info),
    ("GET", rf"/api/models/{NAME}/tree/{REVISION}(/(?P<folder>.+))?", _Handler.tree),
    ("GET", rf"/api/models/{NAME}", _Handler.info),
    ("GET HEAD", rf"/{NAME}/resolve/{REVISION}/(?P<file>.+)", _Handler.resolve),
]

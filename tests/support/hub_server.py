"""A stand-in for the Hub on loopback, spoken to by the real client through HF_ENDPOINT; everything
is kept in memory.

It follows what huggingface_hub sends (its source, version 2.4): creating repositories, preupload,
LFS batch with single and multipart uploads and verification, commits (ndjson), repository info,
trees, paths, refs, and `resolve` with ETag, X-Repo-Commit, redirects of large files to another
host, and ranges. It serves no Xet: set HF_HUB_DISABLE_XET=1. Faults on demand: `HubServer.fail` (a
status, or a connection that is cut) and `HubServer.tamper` (other bytes, same size)."""

import base64
import email.utils
import hashlib
import json
import os
import re
import socket
import threading
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

TEXT_BYTES = 4096  # a file beyond this, or of one of these kinds, is a large one
LARGE_SUFFIXES = (".safetensors", ".png", ".parquet", ".tif", ".bin")
REPO = r"(?P<owner>[\w.-]+)/(?P<name>[\w.-]+)"
KIND = r"(?P<kind>models|datasets|spaces)"


def git_sha1(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@dataclass(frozen=True)
class Entry:
    """A file of a commit; `sha256` is None for one that git holds itself."""

    size: int
    oid: str
    sha256: str | None


@dataclass
class Repo:
    private: bool
    commits: dict = field(default_factory=dict)  # sha -> (title, {path: Entry})
    branches: dict = field(default_factory=dict)
    tags: dict = field(default_factory=dict)

    def find(self, revision: str) -> str | None:
        """The commit that a branch, a tag or a hash names."""
        return (
            self.branches.get(revision)
            or self.tags.get(revision)
            or (revision if revision in self.commits else None)
        )


@dataclass
class Fault:
    """What the next `times` requests that match get: a status, or a connection cut after
    `cut_after` bytes of either body.
    """

    method: str
    path: str
    status: int | None = None
    times: int = 1
    headers: dict = field(default_factory=dict)
    cut_after: int | None = None
    skip: int = 0


class HubServer:
    """The server and its memory. tokens: token -> {"name", "orgs", "role"}. `requests` lists
    (method, path, body bytes received), `sent` (path, body bytes that it was to send)."""

    def __init__(self, chunk_size: int | None = None):
        self.tokens = {
            "write-token": {"name": "you", "orgs": ["lab"], "role": "write"},
            "read-token": {"name": "you", "orgs": [], "role": "read"},
            "other-token": {"name": "other", "orgs": [], "role": "write"},
        }
        self.repos: dict[tuple[str, str], Repo] = {}
        self.blobs: dict[str, bytes] = {}  # by git's SHA-1 and by SHA-256
        self.parts: dict[str, dict[int, bytes]] = {}
        self.served: dict[str, bytes] = {}  # what is served in place of a blob
        self.faults: list[Fault] = []
        self.requests: list[tuple[str, str, int]] = []
        self.sent: list[tuple[str, int]] = []
        self.chunk_size = chunk_size
        self.lock = threading.RLock()
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.http.hub = self
        self.port = self.http.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.storage_url = (
            f"http://localhost:{self.port}"  # another host to the client: it sends no token there
        )
        self._thread = threading.Thread(
            target=self.http.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True
        )

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self.http.shutdown()
        self.http.server_close()

    def fail(self, method: str, path: str, **options) -> Fault:
        """Let requests fail whose path matches the regular expression `path`."""
        self.faults.append(Fault(method, path, **options))
        return self.faults[-1]

    def tamper(self, repo_id: str, path: str, kind: str = "models") -> None:
        """Serve other bytes of the same size for a file, under its old name and checksum."""
        entry = self.files(repo_id, kind=kind)[path]
        content = bytearray(self.blobs[entry.sha256 or entry.oid])
        content[len(content) // 2] ^= 0xFF
        self.served[entry.sha256 or entry.oid] = bytes(content)

    def files(self, repo_id: str, revision: str = "main", kind: str = "models") -> dict[str, Entry]:
        repo = self.repos[kind, repo_id]
        return repo.commits[repo.find(revision)][1]

    def read(self, repo_id: str, path: str, revision: str = "main", kind: str = "models") -> bytes:
        entry = self.files(repo_id, revision, kind)[path]
        return self.blobs[entry.sha256 or entry.oid]

    def store(self, content: bytes, large: bool) -> Entry:
        sha256 = hashlib.sha256(content).hexdigest() if large else None
        lines = (
            "version https://git-lfs.github.com/spec/v1",
            f"oid sha256:{sha256}",
            f"size {len(content)}",
        )
        pointer = "".join(f"{line}\n" for line in lines).encode()
        oid = git_sha1(pointer if large else content)
        self.blobs[sha256 or oid] = content
        return Entry(len(content), oid, sha256)

    def commit(self, repo: Repo, branch: str, title: str, files: dict[str, Entry]) -> str:
        parent = repo.branches.get(branch, "")
        text = json.dumps(
            [parent, title, len(repo.commits), sorted((p, e.oid) for p, e in files.items())]
        )
        sha = hashlib.sha1(text.encode()).hexdigest()
        repo.commits[sha] = (title, files)
        repo.branches[branch] = sha
        return sha


class Refusal(Exception):
    def __init__(self, status: int, message: str = "", code: str | None = None, **headers):
        self.status, self.message, self.headers = status, message, dict(headers)
        self.headers |= {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})


class Cut(Exception):
    """The connection is to be cut now."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # head and body of a reply go out at once

    def log_message(self, *_):
        pass

    @property
    def hub(self) -> HubServer:
        return self.server.hub

    def do_GET(self):
        self.handle_request()

    do_POST = do_PUT = do_DELETE = do_HEAD = do_GET

    def handle_request(self):
        split = urlsplit(self.path)
        path, query = unquote(split.path), parse_qs(split.query)
        self.fault = self.find_fault(path)
        self.num_received = 0
        try:
            body = self.read_body()
            if self.fault and self.fault.status:
                raise Refusal(self.fault.status, "a fault on demand", **self.fault.headers)
            with self.hub.lock:
                self.route(path, split.path, query, body)
        except Refusal as refusal:
            body = json.dumps({"error": refusal.message}).encode()
            self.reply(refusal.status, body, refusal.headers)
        except (Cut, BrokenPipeError, ConnectionResetError):
            self.close_connection = True
            with suppress(OSError):
                self.connection.shutdown(socket.SHUT_RDWR)
        finally:
            self.hub.requests.append((self.command, path, self.num_received))

    def find_fault(self, path):
        with self.hub.lock:
            for fault in self.hub.faults:
                if fault.times and fault.method == self.command and re.search(fault.path, path):
                    if fault.skip:
                        fault.skip -= 1
                        continue
                    fault.times -= 1
                    return fault
        return None

    def read_body(self) -> bytes:
        pieces, cut_after = (
            [],
            self.fault.cut_after if self.fault and self.command != "GET" else None,
        )
        chunked = "chunked" in self.headers.get("Transfer-Encoding", "")
        left = int(self.headers.get("Content-Length") or 0)
        while chunked or left:
            if chunked:
                left = int(self.rfile.readline().strip() or b"0", 16)
            piece = self.rfile.read(
                min(left, 65536, max(1, cut_after - self.num_received) if cut_after else 65536)
            )
            pieces.append(piece)
            self.num_received += len(piece)
            if cut_after is not None and self.num_received >= cut_after:
                raise Cut
            if chunked:
                piece_left = left - len(piece)
                while piece_left:
                    rest = self.rfile.read(piece_left)
                    pieces.append(rest)
                    self.num_received += len(rest)
                    piece_left -= len(rest)
                self.rfile.readline()
                if left == 0:
                    break
            else:
                left -= len(piece)
        return b"".join(pieces)

    def route(self, path, raw_path, query, body):
        for method, pattern, name in ROUTES:
            match = re.fullmatch(pattern, path)
            if match and self.command in method.split("|"):
                groups = {
                    key: value for key, value in match.groupdict().items() if value is not None
                }
                return getattr(self, name)(query=query, body=body, **groups)
        raise Refusal(404, f"no such page: {self.command} {raw_path}")

    def reply(self, status, body: bytes, headers=None, *, size=None):
        self.send_response(status)
        headers = {"Content-Type": "application/json"} | (headers or {})
        for name, value in headers.items():
            self.send_header(name, str(value))
        self.send_header("Content-Length", str(len(body) if size is None else size))
        self.end_headers()
        if self.command == "HEAD":
            return
        cut_after = self.fault.cut_after if self.fault and self.command == "GET" else None
        self.hub.sent.append((unquote(urlsplit(self.path).path), len(body)))
        self.wfile.write(body if cut_after is None else body[:cut_after])
        if cut_after is not None:
            self.wfile.flush()
            raise Cut

    def reply_json(self, content, status=200, **headers):
        self.reply(status, json.dumps(content).encode(), headers)

    def find_user(self, *, required=False):
        word = self.headers.get("Authorization", "").removeprefix("Bearer ")
        user = self.hub.tokens.get(word)
        if word and user is None:
            raise Refusal(401, "Invalid credentials in Authorization header")
        if required and user is None:
            raise Refusal(401, "Invalid username or password.")
        return user

    def find_repo(self, kind, owner, name, *, write=False) -> Repo:
        user, repo = self.find_user(), self.hub.repos.get((kind, f"{owner}/{name}"))
        belongs = user is not None and owner in (user["name"], *user["orgs"])
        if repo is None or (repo.private and not belongs):
            raise Refusal(404 if user else 401, "Repository not found", "RepoNotFound")
        if write:
            self.check_rights(owner)
        return repo

    def check_rights(self, owner):
        user = self.find_user(required=True)
        if user["role"] != "write" or owner not in (user["name"], *user["orgs"]):
            raise Refusal(403, f'You don\'t have the rights to write into the namespace "{owner}"')

    def find_commit(self, repo, revision) -> str:
        sha = repo.find(revision)
        if sha is None:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return sha

    # --- accounts and repositories

    def whoami(self, **_):
        user = self.find_user(required=True)
        orgs = [{"name": name, "type": "org", "roleInOrg": "write"} for name in user["orgs"]]
        token = {"displayName": "test", "role": user["role"]}
        self.reply_json(
            {
                "type": "user",
                "name": user["name"],
                "orgs": orgs,
                "auth": {"type": "access_token", "accessToken": token},
            }
        )

    def create(self, body, **_):
        wanted = json.loads(body)
        user = self.find_user(required=True)
        owner, kind = wanted.get("organization") or user["name"], wanted.get("type", "model") + "s"
        self.check_rights(owner)
        repo_id = f"{owner}/{wanted['name']}"
        prefix = "" if kind == "models" else f"{kind}/"
        url = f"{self.hub.url}/{prefix}{repo_id}"
        if (kind, repo_id) in self.hub.repos:
            self.reply_json({"error": "You already created this repo", "url": url}, 409)
            return
        repo = Repo(private=wanted.get("visibility") == "private" or bool(wanted.get("private")))
        self.hub.repos[kind, repo_id] = repo
        attributes = self.hub.store(
            b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n", large=False
        )
        self.hub.commit(repo, "main", "initial commit", {".gitattributes": attributes})
        self.reply_json({"url": url, "name": repo_id, "id": "0"})

    def validate_yaml(self, body, **_):
        content = json.loads(body)["content"]
        match = re.match(r"---\n(.*?)\n---\n", content, re.DOTALL)
        errors = [] if match else [{"message": "no metadata"}]
        self.reply_json({"errors": errors, "warnings": []}, 400 if errors else 200)

    def info(self, kind, owner, name, revision="main", query=None, **_):
        repo = self.find_repo(kind, owner, name)
        sha = self.find_commit(repo, revision)
        files = repo.commits[sha][1]
        siblings = []
        for path, entry in files.items():
            lfs = (
                {"lfs": {"sha256": entry.sha256, "size": entry.size, "pointerSize": 130}}
                if entry.sha256
                else {}
            )
            siblings.append({"rfilename": path, "size": entry.size, "blobId": entry.oid} | lfs)
        now = "2026-01-01T00:00:00.000Z"
        basis = {
            "_id": "0",
            "id": f"{owner}/{name}",
            "modelId": f"{owner}/{name}",
            "author": owner,
            "sha": sha,
        }
        basis |= {
            "private": repo.private,
            "disabled": False,
            "gated": False,
            "downloads": 0,
            "likes": 0,
            "tags": [],
        }
        self.reply_json(basis | {"lastModified": now, "createdAt": now, "siblings": siblings})

    def tree(self, kind, owner, name, revision, query, folder="", **_):
        repo = self.find_repo(kind, owner, name)
        files = repo.commits[self.find_commit(repo, revision)][1]
        recursive = query.get("recursive", ["false"])[0].lower() in ("true", "1")
        prefix, rows, folders = f"{folder}/" if folder else "", [], {}
        for path, entry in sorted(files.items()):
            rest = path.removeprefix(prefix)
            if not path.startswith(prefix):
                continue
            parts = rest.split("/")
            for depth in range(1, len(parts) if recursive else min(2, len(parts))):
                folders.setdefault(prefix + "/".join(parts[:depth]), None)
            if recursive or len(parts) == 1:
                rows.append(describe(path, entry))
        if folder and not rows and not folders:
            raise Refusal(404, f"{folder} does not exist", "EntryNotFound")
        rows += [
            {"type": "directory", "path": path, "oid": git_sha1(path.encode()), "size": 0}
            for path in folders
        ]
        self.reply_json(rows)

    def paths_info(self, kind, owner, name, revision, body, **_):
        repo = self.find_repo(kind, owner, name)
        files = repo.commits[self.find_commit(repo, revision)][1]
        is_json = "json" in self.headers.get("Content-Type", "")
        paths = json.loads(body)["paths"] if is_json else parse_qs(body.decode()).get("paths", [])
        rows = [describe(path, files[path]) for path in paths if path in files]
        for path in paths:
            if path not in files and any(each.startswith(f"{path}/") for each in files):
                rows.append(
                    {"type": "directory", "path": path, "oid": git_sha1(path.encode()), "size": 0}
                )
        self.reply_json(rows)

    def refs(self, kind, owner, name, **_):
        repo = self.find_repo(kind, owner, name)
        rows = {
            each: [
                {"name": key, "ref": f"refs/{ref}/{key}", "targetCommit": sha}
                for key, sha in known.items()
            ]
            for each, ref, known in (
                ("branches", "heads", repo.branches),
                ("tags", "tags", repo.tags),
            )
        }
        self.reply_json(rows | {"converts": []})

    def commits(self, kind, owner, name, revision, **_):
        repo = self.find_repo(kind, owner, name)
        self.find_commit(repo, revision)
        now = "2026-01-01T00:00:00.000Z"
        rows = [
            {"id": sha, "title": title, "message": "", "date": now, "authors": [{"user": owner}]}
            for sha, (title, _) in reversed(repo.commits.items())
        ]
        self.reply_json(rows, **{"X-Total-Count": len(rows)})

    def branch(self, kind, owner, name, branch, body, **_):
        repo = self.find_repo(kind, owner, name, write=True)
        if branch in repo.branches:
            raise Refusal(409, f"Reference already exists: {branch}")
        start = json.loads(body or b"{}").get("startingPoint") or "main"
        repo.branches[branch] = self.find_commit(repo, start)
        self.reply_json({})

    def tag(self, kind, owner, name, revision, body, **_):
        repo = self.find_repo(kind, owner, name, write=True)
        tag = json.loads(body)["tag"]
        if tag in repo.tags:
            raise Refusal(409, f"Tag already exists: {tag}")
        repo.tags[tag] = self.find_commit(repo, revision)
        self.reply_json({})

    # --- uploads

    def preupload(self, kind, owner, name, revision, body, **_):
        repo = self.find_repo(kind, owner, name, write=True)
        files, rows = repo.commits[self.find_commit(repo, revision)][1], []
        for each in json.loads(body)["files"]:
            large = each["size"] > TEXT_BYTES * 16 or each["path"].endswith(LARGE_SUFFIXES)
            row = {
                "path": each["path"],
                "uploadMode": "lfs" if large else "regular",
                "shouldIgnore": False,
            }
            known = files.get(each["path"])
            rows.append(row | {"oid": (known.sha256 or known.oid) if known else None})
        self.reply_json({"files": rows})

    def batch(self, owner, name, body, prefix="", **_):
        self.find_repo(prefix.strip("/") or "models", owner, name, write=True)
        rows = []
        for each in json.loads(body)["objects"]:
            oid, size = each["oid"], each["size"]
            if oid in self.hub.blobs:
                rows.append({"oid": oid, "size": size})
                continue
            upload = {"href": f"{self.hub.storage_url}/lfs-storage/{oid}"}
            if self.hub.chunk_size and size > self.hub.chunk_size:
                count = -(-size // self.hub.chunk_size)
                header = {
                    f"{i + 1:05d}": f"{self.hub.storage_url}/lfs-storage/{oid}/{i + 1}"
                    for i in range(count)
                }
                upload = {
                    "href": f"{self.hub.url}/lfs-complete/{oid}",
                    "header": {"chunk_size": str(self.hub.chunk_size)} | header,
                }
            verify = {"href": f"{self.hub.url}/lfs-verify/{oid}"}
            rows.append({"oid": oid, "size": size, "actions": {"upload": upload, "verify": verify}})
        self.reply_json({"transfer": "basic", "objects": rows})

    def put_large(self, oid, body, part=None, **_):
        if self.headers.get("Authorization"):
            raise Refusal(400, "the storage is not ours: no token may be sent to it")
        if part is None:
            self.keep_large(oid, body)
        else:
            self.hub.parts.setdefault(oid, {})[int(part)] = body
        self.reply(200, b"", {"ETag": f'"{hashlib.md5(body).hexdigest()}"'})

    def complete(self, oid, body, **_):
        parts = self.hub.parts.get(oid, {})
        numbers = [each["partNumber"] for each in json.loads(body)["parts"]]
        if sorted(parts) != numbers:
            raise Refusal(400, f"parts {sorted(parts)} came, not {numbers}")
        self.keep_large(oid, b"".join(parts[number] for number in numbers))
        self.reply_json({})

    def keep_large(self, oid, content):
        if hashlib.sha256(content).hexdigest() != oid:
            raise Refusal(400, "the content is not what its checksum says")
        self.hub.blobs[oid] = content

    def verify(self, oid, body, **_):
        self.find_user(required=True)
        if len(self.hub.blobs.get(oid, b"")) != json.loads(body)["size"]:
            raise Refusal(404, "not uploaded")
        self.reply_json({})

    def post_commit(self, kind, owner, name, revision, body, **_):
        repo = self.find_repo(kind, owner, name, write=True)
        files, title = dict(repo.commits[self.find_commit(repo, revision)][1]), ""
        for line in body.decode().splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "header":
                title = value["summary"]
            elif item["key"] == "file":
                files[value["path"]] = self.hub.store(
                    base64.b64decode(value["content"]), large=False
                )
            elif item["key"] == "lfsFile":
                if value["oid"] not in self.hub.blobs:
                    raise Refusal(400, f"{value['path']}: its content was not uploaded")
                files[value["path"]] = self.hub.store(self.hub.blobs[value["oid"]], large=True)
            elif item["key"] == "deletedFile":
                files.pop(value["path"])
            elif item["key"] == "deletedFolder":
                files = {
                    path: entry
                    for path, entry in files.items()
                    if not path.startswith(value["path"])
                }
        sha = self.hub.commit(repo, revision, title, files)
        self.reply_json(
            {
                "success": True,
                "commitOid": sha,
                "commitUrl": f"{self.hub.url}/{owner}/{name}/commit/{sha}",
            }
        )

    # --- downloads

    def resolve(self, owner, name, revision, file, prefix="", **_):
        repo = self.find_repo(prefix.strip("/") or "models", owner, name)
        sha = self.find_commit(repo, revision)
        entry = repo.commits[sha][1].get(file)
        headers = {"X-Repo-Commit": sha}
        if entry is None:
            raise Refusal(404, "Entry not found", "EntryNotFound", **headers)
        if entry.sha256:
            headers |= {"X-Linked-Etag": f'"{entry.sha256}"', "X-Linked-Size": entry.size}
            headers["Location"] = f"{self.hub.storage_url}/lfs-storage/{entry.sha256}"
            self.reply(302, b"", headers)
            return
        self.send_content(entry.oid, headers | {"ETag": f'"{entry.oid}"'})

    def get_large(self, oid, **_):
        if self.headers.get("Authorization"):
            raise Refusal(400, "the storage is not ours: no token may be sent to it")
        if oid not in self.hub.blobs:
            raise Refusal(404, "no such object")
        self.send_content(oid, {"ETag": f'"{oid}"'})

    def send_content(self, oid, headers):
        content = self.hub.served.get(oid, self.hub.blobs[oid])
        headers = headers | {"Accept-Ranges": "bytes", "Content-Type": "application/octet-stream"}
        headers["Last-Modified"] = email.utils.formatdate(0, usegmt=True)
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if not match:
            self.reply(200, content, headers, size=len(content))
            return
        start, stop = int(match[1]), int(match[2] or len(content) - 1) + 1
        headers["Content-Range"] = f"bytes {start}-{min(stop, len(content)) - 1}/{len(content)}"
        self.reply(206, content[start:stop], headers, size=len(content[start:stop]))


def describe(path, entry: Entry) -> dict:
    row = {"type": "file", "path": path, "oid": entry.oid, "size": entry.size}
    if entry.sha256:
        row["lfs"] = {"oid": entry.sha256, "size": entry.size, "pointerSize": 130}
    return row


ROUTES = [
    ("GET", "/api/whoami-v2", "whoami"),
    ("POST", "/api/repos/create", "create"),
    ("POST", "/api/validate-yaml", "validate_yaml"),
    ("GET", f"/api/{KIND}/{REPO}(/revision/(?P<revision>.+))?", "info"),
    ("GET", f"/api/{KIND}/{REPO}/tree/(?P<revision>[^/]+)(/(?P<folder>.+))?", "tree"),
    ("POST", f"/api/{KIND}/{REPO}/paths-info/(?P<revision>.+)", "paths_info"),
    ("GET", f"/api/{KIND}/{REPO}/refs", "refs"),
    ("GET", f"/api/{KIND}/{REPO}/commits/(?P<revision>.+)", "commits"),
    ("POST", f"/api/{KIND}/{REPO}/branch/(?P<branch>.+)", "branch"),
    ("POST", f"/api/{KIND}/{REPO}/tag/(?P<revision>.+)", "tag"),
    ("POST", f"/api/{KIND}/{REPO}/preupload/(?P<revision>.+)", "preupload"),
    ("POST", f"/api/{KIND}/{REPO}/commit/(?P<revision>.+)", "post_commit"),
    ("POST", rf"/(?P<prefix>datasets/|spaces/)?{REPO}\.git/info/lfs/objects/batch", "batch"),
    ("PUT", r"/lfs-storage/(?P<oid>[0-9a-f]{64})(/(?P<part>\d+))?", "put_large"),
    ("GET|HEAD", r"/lfs-storage/(?P<oid>[0-9a-f]{64})", "get_large"),
    ("POST", r"/lfs-complete/(?P<oid>[0-9a-f]{64})", "complete"),
    ("POST", r"/lfs-verify/(?P<oid>[0-9a-f]{64})", "verify"),
    (
        "GET|HEAD",
        rf"/(?P<prefix>datasets/|spaces/)?{REPO}/resolve/(?P<revision>[^/]+)/(?P<file>.+)",
        "resolve",
    ),
]


def make_environment(server, home, **changes) -> dict:
    """Environment of a process with a private cache that speaks to `server`."""
    keep = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith(("HF_", "HUGGING_FACE"))
    }
    return keep | {
        "HF_ENDPOINT": server.url,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "NO_PROXY": "127.0.0.1,localhost",
        "OMP_NUM_THREADS": "1",
        **changes,
    }

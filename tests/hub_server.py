"""A Hub of the tests' own: what huggingface_hub asks of one, over HTTP, with real revisions and faults on demand.

Spoken are repositories, preupload, LFS, commits, pull requests, branches, tags, downloads and card validation, as
huggingface_hub 2.4 calls them. Answers follow the Hub where a publisher could trip over it: a private repository is
hidden without a token, a drafted pull request does not merge, a stale parent commit is refused, and large files come
from another host, which must not see the token.
"""

import base64
import hashlib
import json
import re
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest
import yaml
from huggingface_hub import close_session, constants


MAIN = "refs/heads/main"
DATE = "2026-01-01T00:00:00.000Z"
LFS_SUFFIXES = (".safetensors", ".bin")
FAULTS = (429, 500, 503, 401, 403, 404, 412, 413, "drop", "slow", "lost")


@dataclass(frozen=True)
class Blob:
    content: bytes
    is_lfs: bool = False

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def oid(self) -> str:
        """Git's id of the file, of the pointer for a large one."""
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(self.content)}\n"
        stored = pointer.encode() if self.is_lfs else self.content
        return hashlib.sha1(b"blob %d\0" % len(stored) + stored).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 if self.is_lfs else self.oid


@dataclass(frozen=True)
class Commit:
    oid: str
    parent: str | None
    title: str
    files: dict[str, Blob]


@dataclass
class Discussion:
    num: int
    title: str
    status: str
    base: str
    is_pull_request: bool = True
    merge_commit: str | None = None


@dataclass
class Repo:
    private: bool
    commits: dict[str, Commit] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    discussions: list[Discussion] = field(default_factory=list)

    def commit(self, ref: str, title: str, files: dict[str, Blob], parent: str | None = None) -> Commit:
        parent = parent or self.refs.get(ref)
        names = json.dumps([len(self.commits), parent, title, sorted((n, b.sha256) for n, b in files.items())])
        made = Commit(hashlib.sha1(names.encode()).hexdigest(), parent, title, files)
        self.commits[made.oid] = made
        self.refs[ref] = made.oid
        return made

    def find(self, revision: str) -> Commit | None:
        for ref in (revision, f"refs/heads/{revision}", f"refs/tags/{revision}"):
            if ref in self.refs:
                return self.commits[self.refs[ref]]
        return self.commits.get(revision)

    def history(self, ref: str = MAIN) -> list[Commit]:
        """Newest first."""
        commits, oid = [], self.refs.get(ref)
        while oid is not None:
            commits.append(self.commits[oid])
            oid = commits[-1].parent
        return commits


@dataclass
class User:
    name: str
    role: str = "write"
    orgs: dict[str, str] = field(default_factory=dict)


class Refusal(Exception):
    """An answer that is no success."""

    def __init__(self, status: int, message: str, code: str = "", **body: Any):
        self.status, self.headers = status, {"X-Error-Message": message}
        if code:
            self.headers["X-Error-Code"] = code
        self.body = {"error": message, **body}


class Hub:
    """State of the server; everything that a test looks at or sets.

    Attributes:
        users: by token.
        calls: (kind of call, method, path) in the order of arrival.
        faults: (kind of call, what happens), each used up by the first call that it meets. What happens is a status
            code, `drop` (the socket closes before anything is done), `lost` (the call is carried out, then the socket
            closes) or `slow` (the answer comes in drops).
    """

    def __init__(self, token: str):
        self.users = {token: User("me")}
        self.repos: dict[str, Repo] = {}
        self.collections: dict[str, list[str]] = {}
        self.objects: dict[str, bytes] = {}
        self.calls: list[tuple[str, str, str]] = []
        self.faults: list[tuple[str, int | str]] = []
        self.leaks: list[str] = []
        self.lock = threading.RLock()
        self.endpoint = self.cdn = ""

    def counts(self) -> Counter[str]:
        return Counter(kind for kind, _, _ in self.calls)

    def create(self, repo_id: str, private: bool = True) -> Repo:
        repo = self.repos[repo_id] = Repo(private)
        repo.commit(MAIN, "initial commit", {".gitattributes": Blob(b"*.safetensors filter=lfs\n")})
        return repo

    def take_fault(self, kind: str) -> int | str | None:
        with self.lock:
            for number, (faulty, what) in enumerate(self.faults):
                if faulty == kind:
                    del self.faults[number]
                    return what
        return None


@contextmanager
def running_hub(token: str) -> Iterator[Hub]:
    """A Hub on a free port of this machine; `hub.endpoint` is its address."""
    hub = Hub(token)

    class Handler(_Handler):
        pass

    Handler.hub = hub
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    hub.cdn = f"http://localhost:{server.server_port}/cdn"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


def adopt(endpoint: str) -> None:
    """Make this process, forked by one that had other variables, talk to a Hub."""
    constants.ENDPOINT, constants.HF_HUB_OFFLINE, constants.HF_HUB_DISABLE_XET = endpoint, False, True
    close_session()


@contextmanager
def hub_of_this_process(token: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A Hub that this process and its children talk to."""
    with running_hub(token) as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
        template = hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        names = {"ENDPOINT": hub.endpoint, "TOKEN": token, "HUB_DISABLE_XET": "1", "HUB_OFFLINE": "0"}
        for name, value in names.items():
            monkeypatch.setenv(f"HF_{name}", value)
        close_session()
        yield hub
        close_session()


REPO = r"(?P<repo>[^/]+/[^/]+)"
MODEL = rf"/api/models/{REPO}"
ROUTES = [
    ("GET", r"/api/whoami-v2", "whoami"),
    ("POST", r"/api/repos/create", "create_repo"),
    ("POST", r"/api/validate-yaml", "validate_yaml"),
    ("GET", r"/api/collections/(?P<slug>[^/]+/[^/]+)", "collection"),
    ("POST", r"/api/collections/(?P<slug>[^/]+/[^/]+)/items", "collection_item"),
    ("GET", rf"{MODEL}/auth-check(?:/write)?", "auth_check"),
    ("GET", rf"{MODEL}/tree/(?P<revision>[^/]+)", "tree"),
    ("GET", rf"{MODEL}/refs", "refs"),
    ("GET", rf"{MODEL}/discussions", "discussions"),
    ("POST", rf"{MODEL}/discussions", "open_discussion"),
    ("GET", rf"{MODEL}/discussions/(?P<num>\d+)", "discussion"),
    ("POST", rf"{MODEL}/discussions/(?P<num>\d+)/comment", "comment"),
    ("POST", rf"{MODEL}/discussions/(?P<num>\d+)/status", "status"),
    ("POST", rf"{MODEL}/discussions/(?P<num>\d+)/merge", "merge"),
    ("POST", rf"{MODEL}/preupload/(?P<revision>[^/]+)", "preupload"),
    ("POST", rf"{MODEL}/commit/(?P<revision>[^/]+)", "commit"),
    ("POST", rf"{MODEL}/tag/(?P<revision>[^/]+)", "tag"),
    ("POST", rf"{MODEL}/branch/(?P<branch>[^/]+)", "branch"),
    ("PUT", rf"{MODEL}/settings", "settings"),
    ("GET", rf"{MODEL}(?:/revision/(?P<revision>[^/]+))?", "model_info"),
    ("POST", rf"/{REPO}\.git/info/lfs/objects/batch", "lfs_batch"),
    ("PUT", r"/lfs/upload/(?P<oid>\w+)", "lfs_upload"),
    ("POST", rf"/lfs/verify/{REPO}", "lfs_verify"),
    ("HEAD", rf"/{REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "resolve_head"),
    ("GET", rf"/{REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "resolve_get"),
    ("GET", r"/cdn/(?P<oid>\w+)", "cdn"),
    ("HEAD", r"/cdn/(?P<oid>\w+)", "cdn"),
]


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else 40 ms a call

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._answer()

    do_HEAD = do_POST = do_PUT = do_GET

    def _answer(self) -> None:
        split = urlsplit(self.path)
        self.query = {key: values[-1] for key, values in parse_qs(split.query).items()}
        body = self._read_body()
        routes = (
            (kind, re.fullmatch(pattern, split.path)) for method, pattern, kind in ROUTES if method == self.command
        )
        kind, match = next(((kind, match) for kind, match in routes if match), ("", None))
        if match is None:
            return self._send(404, {"error": f"no such route: {self.command} {split.path}"})
        values = {key: unquote(value) if value else value for key, value in match.groupdict().items()}
        with self.hub.lock:
            self.hub.calls.append((kind, self.command, split.path))
        fault = self.hub.take_fault(kind)
        if fault == "drop":
            return self._drop()
        if isinstance(fault, int):
            headers = {"RateLimit": '"api";r=0;t=1', "Retry-After": "1"} if fault == 429 else {}
            # what a careless proxy would do: the message repeats the credentials
            return self._send(fault, {"error": f"fault {self.headers.get('Authorization')}"}, headers)
        try:
            with self.hub.lock:
                status, content, headers = getattr(self, f"_{kind}")(body, **values)
        except Refusal as refusal:
            return self._send(refusal.status, refusal.body, refusal.headers)
        if fault == "lost":
            return self._drop()
        self._send(status, content, headers, slow=fault == "slow")

    def _read_body(self) -> bytes:
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            chunks = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                chunks.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(chunks)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _drop(self) -> None:
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def _send(self, status: int, content: Any, headers: dict[str, str] | None = None, *, slow: bool = False) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        step = max(1, len(data) // 4) if slow else max(1, len(data))
        for start in range(0, len(data), step):
            self.wfile.write(data[start : start + step])
            if slow:
                self.wfile.flush()
                time.sleep(0.02)

    # --- who asks, and for what

    def _user(self) -> User | None:
        return self.hub.users.get(self.headers.get("Authorization", "").removeprefix("Bearer "))

    def _repo(self, repo_id: str, *, write: bool = False) -> Repo:
        user = self._user()
        repo = self.hub.repos.get(repo_id)
        owner = repo_id.split("/")[0]
        mine = user is not None and (owner == user.name or owner in user.orgs)
        if repo is None or (repo.private and not mine):
            raise Refusal(404 if user else 401, "Repository not found", "RepoNotFound")
        if write and (user is None or not mine or user.role == "read" or user.orgs.get(owner) == "read"):
            raise Refusal(403 if user else 401, "no write right")
        return repo

    def _revision(self, repo: Repo, revision: str) -> Commit:
        commit = repo.find(revision)
        if commit is None:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit

    # --- calls; each returns (status, content, headers)

    def _whoami(self, body: bytes) -> tuple:
        user = self._user()
        if user is None:
            raise Refusal(401, "Invalid credentials in Authorization header")
        orgs = [{"name": name, "type": "org", "roleInOrg": role} for name, role in user.orgs.items()]
        token = {"accessToken": {"displayName": "test", "role": user.role}}
        return 200, {"type": "user", "name": user.name, "orgs": orgs, "auth": token}, {}

    def _create_repo(self, body: bytes) -> tuple:
        asked, user = json.loads(body), self._user()
        owner = asked.get("organization") or (user.name if user else "")
        if user is None or user.role == "read" or (owner != user.name and user.orgs.get(owner, "read") == "read"):
            raise Refusal(403 if user else 401, "no right to create a repository there")
        repo_id = f"{owner}/{asked['name']}"
        if repo_id in self.hub.repos:
            raise Refusal(409, "You already created this model repo", url=f"{self.hub.endpoint}/{repo_id}")
        self.hub.create(repo_id, private=asked.get("visibility") == "private" or asked.get("private") is True)
        return 200, {"url": f"{self.hub.endpoint}/{repo_id}", "name": repo_id}, {}

    def _validate_yaml(self, body: bytes) -> tuple:
        content = json.loads(body)["content"]
        parts = re.match(r"---\n(.*?)\n---\n", content, re.DOTALL)
        data = yaml.safe_load(parts[1]) if parts else {}
        errors = []
        for key in ("base_model", "datasets"):
            given = data.get(key) or []
            for name in [given] if isinstance(given, str) else given:
                if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name):
                    errors.append({"message": f'"{key}" with value "{name}" is not valid'})
        if errors:
            raise Refusal(400, "Invalid metadata", errors=errors, warnings=[])
        return 200, {"errors": [], "warnings": []}, {}

    def _collection(self, body: bytes, slug: str) -> tuple:
        if slug not in self.hub.collections:
            raise Refusal(404, "Collection not found")
        items = [
            {"_id": str(number), "id": name, "type": "model", "position": number}
            for number, name in enumerate(self.hub.collections[slug])
        ]
        owner = {"name": slug.split("/")[0], "type": "user"}
        shown = {"slug": slug, "title": slug, "owner": owner, "items": items, "lastUpdated": DATE}
        return 200, {**shown, "position": 0, "private": True, "theme": "blue", "upvotes": 0}, {}

    def _collection_item(self, body: bytes, slug: str) -> tuple:
        name = json.loads(body)["item"]["id"]
        self._repo(name)
        if name in self.hub.collections[slug]:
            raise Refusal(409, "the collection has it already")
        self.hub.collections[slug].append(name)
        return self._collection(body, slug)

    def _auth_check(self, body: bytes, repo: str) -> tuple:
        self._repo(repo, write=self.path.endswith("/write"))
        return 200, {}, {}

    def _model_info(self, body: bytes, repo: str, revision: str | None) -> tuple:
        found = self._repo(repo)
        commit = self._revision(found, revision or "main")
        siblings = [{"rfilename": name} for name in commit.files]
        names = {"id": repo, "modelId": repo, "author": repo.split("/")[0]}
        return 200, {**names, "sha": commit.oid, "private": found.private, "siblings": siblings, "tags": []}, {}

    def _tree(self, body: bytes, repo: str, revision: str) -> tuple:
        files = self._revision(self._repo(repo), revision).files
        folders = {name.rpartition("/")[0] for name in files} - {""}
        items: list[dict] = [{"type": "directory", "path": name, "oid": "0" * 40, "size": 0} for name in folders]
        for path, blob in files.items():
            item = {"type": "file", "path": path, "oid": blob.oid, "size": len(blob.content)}
            if blob.is_lfs:
                item["lfs"] = {"oid": blob.sha256, "size": len(blob.content), "pointerSize": 134}
            items.append(item)
        # in pages, so that whoever asks must follow the links
        start = int(self.query.get("cursor", 0))
        query = f"?recursive={self.query.get('recursive', 'false')}&cursor={start + 10}"
        more = {"Link": f'<{self.hub.endpoint}{urlsplit(self.path).path}{query}>; rel="next"'}
        return 200, items[start : start + 10], more if start + 10 < len(items) else {}

    def _refs(self, body: bytes, repo: str) -> tuple:
        found: dict[str, list] = {"branches": [], "tags": [], "converts": [], "pullRequests": []}
        kinds = {"refs/heads/": "branches", "refs/tags/": "tags", "refs/pr/": "pullRequests"}
        for ref, oid in self._repo(repo).refs.items():
            prefix = next(prefix for prefix in kinds if ref.startswith(prefix))
            found[kinds[prefix]].append({"name": ref.removeprefix(prefix), "ref": ref, "targetCommit": oid})
        return 200, found, {}

    def _describe(self, repo_id: str, discussion: Discussion) -> dict:
        return {
            "num": discussion.num,
            "title": discussion.title,
            "status": discussion.status,
            "isPullRequest": discussion.is_pull_request,
            "author": {"name": "me"},
            "createdAt": DATE,
            "repo": {"name": repo_id, "type": "model"},
        }

    def _discussions(self, body: bytes, repo: str) -> tuple:
        found = self._repo(repo).discussions[::-1]
        start = 2 * int(self.query.get("p", 0))
        page = [self._describe(repo, discussion) for discussion in found[start : start + 2]]
        return 200, {"discussions": page, "count": len(found), "start": start}, {}

    def _discussion(self, body: bytes, repo: str, num: str) -> tuple:
        discussion = self._numbered(self._repo(repo), num)
        changes = {"base": MAIN, "mergeCommitId": discussion.merge_commit}
        more = {"changes": changes, "filesWithConflicts": [], "events": [], "diff": ""}
        return 200, {**self._describe(repo, discussion), **more}, {}

    def _numbered(self, repo: Repo, num: str) -> Discussion:
        if int(num) > len(repo.discussions):
            raise Refusal(404, "no such discussion")
        return repo.discussions[int(num) - 1]

    def _open(self, repo: Repo, title: str, status: str, base: str, is_pull_request: bool = True) -> Discussion:
        repo.discussions.append(Discussion(len(repo.discussions) + 1, title, status, base, is_pull_request))
        if is_pull_request:
            repo.refs[f"refs/pr/{len(repo.discussions)}"] = base
        return repo.discussions[-1]

    def _open_discussion(self, body: bytes, repo: str) -> tuple:
        found, asked = self._repo(repo, write=True), json.loads(body)
        status = "draft" if asked["pullRequest"] else "open"
        made = self._open(found, asked["title"], status, found.refs[MAIN], asked["pullRequest"])
        return 200, self._describe(repo, made), {}

    def _event(self, kind: str, **data: Any) -> dict:
        return {"id": "0" * 24, "type": kind, "createdAt": DATE, "author": {"name": "me"}, "data": data}

    def _comment(self, body: bytes, repo: str, num: str) -> tuple:
        self._numbered(self._repo(repo, write=True), num)
        latest = {"raw": json.loads(body)["comment"]}
        return 200, {"newMessage": self._event("comment", edited=False, hidden=False, latest=latest)}, {}

    def _status(self, body: bytes, repo: str, num: str) -> tuple:
        discussion = self._numbered(self._repo(repo, write=True), num)
        discussion.status = json.loads(body)["status"]
        return 200, {"newStatus": self._event("status-change", status=discussion.status)}, {}

    def _merge(self, body: bytes, repo: str, num: str) -> tuple:
        found = self._repo(repo, write=True)
        discussion = self._numbered(found, num)
        if discussion.status != "open":
            raise Refusal(409, f"the pull request is {discussion.status}")
        head, base = found.find(f"refs/pr/{num}"), found.commits[discussion.base].files
        files = dict(found.find("main").files)
        for path in {*head.files, *base}:
            if head.files.get(path) != base.get(path):
                if files.get(path) not in (base.get(path), head.files.get(path)):
                    raise Refusal(409, f"conflict in {path}")
                files[path] = head.files.get(path)
        kept = {path: blob for path, blob in files.items() if blob is not None}
        discussion.merge_commit = found.commit(MAIN, f"{discussion.title} (#{num})", kept).oid
        discussion.status = "merged"
        return 200, {}, {}

    def _preupload(self, body: bytes, repo: str, revision: str) -> tuple:
        commit = self._revision(self._repo(repo, write=True), revision)
        files = []
        for item in json.loads(body)["files"]:
            known = commit.files.get(item["path"])
            mode = "lfs" if item["path"].endswith(LFS_SUFFIXES) else "regular"
            oid = {"oid": known.etag} if known else {}
            files.append({"path": item["path"], "uploadMode": mode, "shouldIgnore": False, **oid})
        return 200, {"files": files}, {}

    def _commit(self, body: bytes, repo: str, revision: str) -> tuple:
        found = self._repo(repo, write=True)
        lines = [json.loads(line) for line in body.splitlines()]
        header = next(line["value"] for line in lines if line["key"] == "header")
        start, opens = self._revision(found, revision), self.query.get("create_pr") == "1"
        parent = header.get("parentCommit")
        if parent and parent != start.oid and not opens:
            raise Refusal(412, "A commit has happened since. Please refresh and try again.")
        files = dict(found.commits[parent].files if parent else start.files)
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = Blob(base64.b64decode(value["content"]))
            elif line["key"] == "lfsFile":
                if value["oid"] not in self.hub.objects:
                    raise Refusal(400, f"{value['path']} was not uploaded")
                files[value["path"]] = Blob(self.hub.objects[value["oid"]], is_lfs=True)
            elif line["key"] == "deletedFile" and files.pop(value["path"], None) is None:
                raise Refusal(404, "A file with this name doesn't exist", "EntryNotFound")
        answer: dict[str, Any] = {"success": True}
        ref = f"refs/heads/{revision}" if f"refs/heads/{revision}" in found.refs else revision
        if opens:
            opened = self._open(found, header["summary"], "open", parent or start.oid)
            ref = f"refs/pr/{opened.num}"
            answer["pullRequestUrl"] = f"{self.hub.endpoint}/{repo}/discussions/{opened.num}"
        made = found.commit(ref, header["summary"], files)
        return 200, {**answer, "commitOid": made.oid, "commitUrl": f"{self.hub.endpoint}/{repo}/commit/{made.oid}"}, {}

    def _tag(self, body: bytes, repo: str, revision: str) -> tuple:
        found, asked = self._repo(repo, write=True), json.loads(body)
        return self._point(found, f"refs/tags/{asked['tag']}", revision)

    def _branch(self, body: bytes, repo: str, branch: str) -> tuple:
        asked = json.loads(body or b"{}")
        return self._point(self._repo(repo, write=True), f"refs/heads/{branch}", asked.get("startingPoint", "main"))

    def _point(self, repo: Repo, ref: str, revision: str) -> tuple:
        commit = self._revision(repo, revision)
        if ref in repo.refs:
            raise Refusal(409, "Reference already exists")
        repo.refs[ref] = commit.oid
        return 200, {}, {}

    def _settings(self, body: bytes, repo: str) -> tuple:
        self._repo(repo, write=True).private = json.loads(body)["visibility"] == "private"
        return 200, {}, {}

    # --- large files

    def _lfs_batch(self, body: bytes, repo: str) -> tuple:
        self._repo(repo, write=True)
        objects = []
        for item in json.loads(body)["objects"]:
            if item["oid"] not in self.hub.objects:
                upload = {"href": f"{self.hub.endpoint}/lfs/upload/{item['oid']}"}
                verify = {"href": f"{self.hub.endpoint}/lfs/verify/{repo}"}
                item = {**item, "actions": {"upload": upload, "verify": verify}}
            objects.append(item)
        return 200, {"transfer": "basic", "objects": objects}, {}

    def _lfs_upload(self, body: bytes, oid: str) -> tuple:
        if hashlib.sha256(body).hexdigest() != oid:
            raise Refusal(400, "the content has another checksum")
        self.hub.objects[oid] = body
        return 200, b"", {}

    def _lfs_verify(self, body: bytes, repo: str) -> tuple:
        asked = json.loads(body)
        if len(self.hub.objects.get(asked["oid"], b"")) != asked["size"]:
            raise Refusal(400, "not all of it arrived")
        return 200, {}, {}

    def _entry(self, repo: str, revision: str, path: str) -> tuple[Commit, Blob]:
        commit = self._revision(self._repo(repo), revision)
        if path not in commit.files:
            raise Refusal(404, "Entry not found", "EntryNotFound")
        return commit, commit.files[path]

    def _resolve_head(self, body: bytes, repo: str, revision: str, path: str) -> tuple:
        commit, blob = self._entry(repo, revision, path)
        headers = {"ETag": f'"{blob.etag}"', "X-Repo-Commit": commit.oid, "Accept-Ranges": "bytes"}
        if not blob.is_lfs:
            return 200, blob.content, headers
        linked = {"X-Linked-ETag": f'"{blob.etag}"', "X-Linked-Size": str(len(blob.content))}
        return 302, b"", {**headers, **linked, "Location": f"{self.hub.cdn}/{blob.sha256}"}

    def _resolve_get(self, body: bytes, repo: str, revision: str, path: str) -> tuple:
        commit, blob = self._entry(repo, revision, path)
        if blob.is_lfs:
            return self._resolve_head(body, repo, revision, path)
        return self._ranged(blob.content, {"ETag": f'"{blob.etag}"', "X-Repo-Commit": commit.oid})

    def _cdn(self, body: bytes, oid: str) -> tuple:
        if self.headers.get("Authorization"):
            self.hub.leaks.append(self.path)
        return self._ranged(self.hub.objects[oid], {"ETag": f'"{oid}"'})

    def _ranged(self, content: bytes, headers: dict[str, str]) -> tuple:
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if asked is None:
            return 200, content, headers
        start, end = int(asked[1]), int(asked[2] or len(content) - 1)
        part = content[start : end + 1]
        return 206, part, {**headers, "Content-Range": f"bytes {start}-{start + len(part) - 1}/{len(content)}"}

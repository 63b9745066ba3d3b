"""A hub on the loopback: as much of the Hugging Face hub's HTTP interface as its own clients need to read from it.

`Hub` serves repositories that are dictionaries: (kind, name) → revision → file → bytes. A revision has a commit of its own and
answers to its name and to the commit; what was asked for is kept in `asked`, so that a test can say what a client fetched.
`HF_ENDPOINT` is read once, when `huggingface_hub` is imported; so what is to talk to this hub runs in a process of its own
with `environment`.
"""

import hashlib
import json
import os
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import PurePosixPath
from urllib.parse import parse_qs, unquote, urlsplit

API = re.compile(r"/api/(?P<kind>models|datasets)/(?P<name>[^/]+/[^/]+)(?:/(?P<what>revision|tree|paths-info)/(?P<rest>.*))?")
FILE = re.compile(r"(?:/(?P<kind>datasets))?/(?P<name>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)")


class Hub:
    """A context manager; `repositories` may grow while it runs."""

    def __init__(self, repositories):
        self.repositories, self.asked = repositories, []

    def __enter__(self):
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.address = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05})
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def environment(self, home):
        """Of a process whose hub this is, with its cache under `home`."""
        settings = {"HF_ENDPOINT": self.address, "HF_HOME": str(home)}
        settings |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
        ours = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        return ours | settings | {"NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1", "OMP_NUM_THREADS": "1"}

    def files(self, kind, name, revision):
        """(commit, files) of a revision's name or commit. KeyError where there is none."""
        for label, files in self.repositories[kind, name].items():
            if revision in (label, commit_of(label)):
                return commit_of(label), files
        raise KeyError(revision)


def commit_of(revision):
    """The commit of a revision's name: 40 hexadecimal digits."""
    return hashlib.sha1(revision.encode()).hexdigest()


def _entries(files):
    """Path → what the hub tells of it, of every file and of the folders that they lie in."""
    folders = {str(folder) for path in files for folder in PurePosixPath(path).parents if folder.name}
    found = {path: {"type": "directory", "path": path, "size": 0, "oid": commit_of(path)} for path in sorted(folders)}
    for path, content in files.items():
        found[path] = {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
    return found


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self._answer()

    def do_HEAD(self):
        self._answer()

    def do_POST(self):
        self._answer(self.rfile.read(int(self.headers.get("Content-Length", 0))))

    def _answer(self, body=b""):
        path = unquote(urlsplit(self.path).path)
        try:
            if found := API.fullmatch(path):
                return self._api(**found.groupdict(), body=body)
            if found := FILE.fullmatch(path):
                return self._file(**found.groupdict())
            return self._send(404, b"{}")
        except KeyError as error:
            which = "RevisionNotFound" if isinstance(error.args[0], str) else "RepoNotFound"
            return self._send(404, b'{"error": "not found"}', {"X-Error-Code": which})

    def _api(self, kind, name, what, rest, body):
        revision, _, inside = (rest or "main").partition("/")
        commit, files = self.hub.files(kind, name, revision)
        if what in ("revision", None):
            siblings = [{"rfilename": path} for path in files]
            return self._json({"id": name, "sha": commit, "private": False, "tags": [], "siblings": siblings})
        if what == "tree":
            return self._json([entry for path, entry in _entries(files).items() if path.startswith(inside)])
        asked = json.loads(body)["paths"] if body.startswith(b"{") else parse_qs(body.decode()).get("paths", [])
        return self._json([entry for path, entry in _entries(files).items() if path in asked])

    def _file(self, kind, name, revision, path):
        commit, files = self.hub.files(kind or "models", name, revision)
        if path not in files:
            return self._send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
        content = files[path]
        self.hub.asked.append((self.command, name, commit, path))
        headers = {"X-Repo-Commit": commit, "ETag": f'"{hashlib.sha1(content).hexdigest()}"', "Accept-Ranges": "bytes"}
        if span := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            start, end = int(span[1]), min(int(span[2] or len(content) - 1), len(content) - 1)
            headers["Content-Range"] = f"bytes {start}-{end}/{len(content)}"
            return self._send(206, content[start : end + 1], headers)
        return self._send(200, content, headers)

    def _json(self, value):
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _send(self, status, content, headers=None):
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *_):
        """Silence: a test says what it wants to see."""

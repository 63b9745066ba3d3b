"""Text in a bucket, for real: pyarrow's S3 client reads from a server on the loopback that speaks the four requests it makes.

The same addresses were read once through `s3fs` from a server of `moto`, and once through pyarrow from that server, with the
same documents (docs/LOG.md); those packages want an older python-dateutil than everything else here.
"""

import gzip
import io
import re
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from headspring.artifacts import UserError
from headspring.text.sources import Files, Reading

LONG = "bee " * 30000


def parquet(*texts):
    file = io.BytesIO()
    pq.write_table(pa.table({"text": list(texts)}), file)
    return file.getvalue()


OBJECTS = {
    "notes/a.md": b"# a\n",
    "notes/deep/b.txt": LONG.encode(),
    "notes/.hidden/x.txt": b"no",
    "notes/rows.jsonl.gz": gzip.compress(b'{"text": "a row"}\n'),
    "notes/table.parquet": parquet("one", "two"),
    "notes/odd é+ name.txt": b"odd",
    "notes/picture.dat": b"\0\1",
}
TEXTS = [("a.md", "# a\n"), ("deep/b.txt", LONG), ("odd é+ name.txt", "odd"), ("rows.jsonl.gz", "a row")]
TEXTS += [("table.parquet", "one"), ("table.parquet", "two")]


class Bucket(BaseHTTPRequestHandler):
    """`corpus` at http://HOST/corpus/KEY: HEAD and GET of an object, its ranges, and ListObjectsV2."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        url = urlsplit(self.path)
        bucket, _, key = unquote(url.path).removeprefix("/").partition("/")
        if bucket != "corpus" or (key and key not in OBJECTS):
            return self.send(404, b"")
        return self.content(OBJECTS[key]) if key else self.listing(parse_qs(url.query))

    do_HEAD = do_GET

    def content(self, content):
        if span := re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", "")):
            start, end = int(span[1]), min(int(span[2]), len(content) - 1)
            return self.send(206, content[start : end + 1], {"Content-Range": f"bytes {start}-{end}/{len(content)}"})
        return self.send(200, content)

    def listing(self, query):
        prefix, delimiter = query.get("prefix", [""])[0], query.get("delimiter", [""])[0]
        files, folders = [], set()
        for key in sorted(key for key in OBJECTS if key.startswith(prefix)):
            head, found, _ = key[len(prefix) :].partition(delimiter) if delimiter else (key, "", "")
            folders.add(prefix + head + "/") if found else files.append(key)
        entries = [f"<Contents><Key>{escape(key)}</Key><Size>{len(OBJECTS[key])}</Size></Contents>" for key in files]
        entries += [f"<CommonPrefixes><Prefix>{escape(name)}</Prefix></CommonPrefixes>" for name in sorted(folders)]
        head = f"<KeyCount>{len(entries)}</KeyCount><IsTruncated>false</IsTruncated>"
        self.send(200, f"<ListBucketResult>{head}{''.join(entries)}</ListBucketResult>".encode())

    def send(self, status, content, headers=None):
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *_):
        """Silence: a test says what it wants to see."""


@pytest.fixture
def bucket(monkeypatch):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Bucket)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    monkeypatch.setitem(sys.modules, "s3fs", None)  # where it is installed it would be the client
    settings = {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.server_port}", "AWS_REGION": "us-east-1"}
    settings |= {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "AWS_EC2_METADATA_DISABLED": "true"}
    for name, value in (settings | {"NO_PROXY": "127.0.0.1"}).items():
        monkeypatch.setenv(name, value)
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def read(*paths, **options):
    """(path, text) of every document; a long file's pieces joined."""
    whole = {}
    for document in Files(paths=list(paths), **options).read("s3", Reading()):
        key = (document.path, document.metadata.get("row"))
        whole[key] = whole.get(key, "") + document.text
    return [(path, text) for (path, _), text in whole.items()]


@pytest.mark.parametrize("address", ["s3://corpus/notes", "s3://corpus/notes/", "s3://corpus", "s3a://corpus/notes"])
def test_a_folder_of_a_bucket_is_read_whole(bucket, address):
    base = address.rstrip("/") if "notes" in address else address + "/notes"
    assert read(address) == [(f"{base}/{name}", text) for name, text in TEXTS]


@pytest.mark.parametrize(("address", "names"), [
    ("s3://corpus/notes/a.md", ["a.md"]), ("s3://corpus/notes/*.md", ["a.md"]), ("s3://corpus/*/deep/*.txt", ["deep/b.txt"]),
])  # fmt: skip
def test_files_and_globs_of_a_bucket(bucket, address, names):
    assert read(address) == [(f"s3://corpus/notes/{name}", dict(TEXTS)[name]) for name in names]


@pytest.mark.parametrize(("address", "says"), [
    ("s3://corpus/none", "no such file or folder"), ("s3://elsewhere/none", "no such file or folder"),
    ("s3://corpus/notes/picture.dat", "binary file"), ("gs://corpus/notes", "gcsfs"),
])  # fmt: skip
def test_what_cannot_be_read_is_one_line_with_its_address(bucket, monkeypatch, address, says):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(UserError, match=rf"^{address}: .*{says}") as caught:
        read(address)
    assert "\n" not in str(caught.value)


def test_a_bucket_that_does_not_answer_is_one_line(bucket, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(UserError, match=r"^s3://corpus/notes: cannot be opened \(.*connect") as caught:
        read("s3://corpus/notes")
    assert "\n" not in str(caught.value)

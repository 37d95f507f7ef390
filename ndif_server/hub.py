"""A stand-in for the Hugging Face hub: serves the model folders ROOT/ORG/NAME under the ids ORG/NAME, on loopback.

    python hub.py --root DIR [--port 8090]

It answers what huggingface_hub and transformers ask in order to find and download a model: the model's card, its list
of files, and the files, whole or in part. A client is pointed at it by HF_ENDPOINT. A model folder has one revision,
called main, whose commit id is made from the names, sizes and times of its files.
"""

import argparse
import hashlib
import json
import math
import os
import re
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

NAME = r"([\w][\w.-]*/[\w][\w.-]*)"  # neither part can be "..", nor hold a slash
CARD = re.compile(rf"/api/models/{NAME}(?:/revision/([^/]+))?")
TREE = re.compile(rf"/api/models/{NAME}/tree/([^/]+)(?:/(.*))?")
FILE = re.compile(rf"/{NAME}/resolve/([^/]+)/(.+)")
CHUNK = 1 << 20


class Repo:
    """One model folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.resolve()
        # A snapshot in a Hugging Face cache holds links to the folder blobs beside it: those may be served too.
        cache = self.folder.parent.parent
        self.allowed = [self.folder] + ([cache / "blobs"] if self.folder.parent.name == "snapshots" else [])

    def file(self, name: str) -> Path | None:
        """The real path of a file of the model; None if there is none, or if a link leads out of the model's folder."""
        try:
            path = (self.folder / name).resolve()
            return path if path.is_file() and any(root in path.parents for root in self.allowed) else None
        except (OSError, ValueError):  # a name that no file can have
            return None

    def files(self) -> Iterator[tuple[str, Path]]:
        """Names and real paths, without hidden files. Links to folders inside a model are not followed."""
        for where, folders, names in os.walk(self.folder):
            folders[:] = sorted(f for f in folders if not f.startswith("."))
            for name in sorted(n for n in names if not n.startswith(".")):
                relative = str((Path(where) / name).relative_to(self.folder))
                if path := self.file(relative):
                    yield relative, path

    def commit(self) -> str:
        """An id that changes when a file does."""
        return digest("".join(f"{name}:{tag(path)};" for name, path in self.files()))

    def parameters(self) -> dict[str, int]:
        """How many numbers of each type the safetensors files hold, from their headers."""
        total: dict[str, int] = {}
        for name, path in self.files():
            if not name.endswith(".safetensors"):
                continue
            with path.open("rb") as file:
                header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
            for key, value in header.items():
                if key != "__metadata__":
                    total[value["dtype"]] = total.get(value["dtype"], 0) + math.prod(value["shape"])
        return total

    def card(self, repo_id: str) -> dict:
        """What the hub tells about a model, as far as clients read it."""
        counts = self.parameters()
        return {
            "_id": "0" * 24,
            "id": repo_id,
            "modelId": repo_id,
            "sha": self.commit(),
            "private": False,
            "gated": False,
            "disabled": False,
            "pipeline_tag": "text-generation",
            "library_name": "transformers",
            "tags": ["transformers", "safetensors"],
            "downloads": 0,
            "likes": 0,
            "siblings": [{"rfilename": name, "size": path.stat().st_size} for name, path in self.files()],
            "safetensors": {"parameters": counts, "total": sum(counts.values())},
        }

    def tree(self, under: str, recursive: bool) -> list[dict]:
        """The entries below a folder of the model."""
        prefix = f"{under.strip('/')}/" if under.strip("/") else ""
        entries: dict[str, dict] = {}
        for name, path in self.files():
            if not name.startswith(prefix):
                continue
            folder, slash, _ = name[len(prefix) :].partition("/")
            if slash and not recursive:
                name = prefix + folder
                entries[name] = {"type": "directory", "path": name, "size": 0, "oid": digest(name)}
            else:
                entries[name] = {"type": "file", "path": name, "size": path.stat().st_size, "oid": tag(path)}
        return list(entries.values())


def digest(text: str) -> str:
    """Forty hexadecimal digits, like a commit id."""
    return hashlib.sha1(text.encode()).hexdigest()


def tag(path: Path) -> str:
    """An id of a file's content that needs no reading of it."""
    stat = path.stat()
    return digest(f"{path}:{stat.st_size}:{stat.st_mtime_ns}")


class Handler(BaseHTTPRequestHandler):
    """Answers GET and HEAD."""

    protocol_version = "HTTP/1.1"
    timeout = 120  # of an idle connection
    root: Path

    def do_GET(self) -> None:
        """Send the page, the list or the file that the path names."""
        url = urlsplit(self.path)
        if url.path == "/":
            return self.send_json(200, {"models": sorted(str(p.relative_to(self.root)) for p in self.root.glob("*/*"))})
        for pattern, answer in ((CARD, self.answer_card), (TREE, self.answer_tree), (FILE, self.answer_file)):
            if match := pattern.fullmatch(url.path):
                repo_id, revision, rest = (unquote(part or "") for part in (*match.groups(), "")[:3])
                if not (self.root / repo_id).is_dir():
                    return self.send_missing("Repository not found", "RepoNotFound")
                repo = Repo(self.root / repo_id)
                if revision not in ("", "main") and revision != repo.commit():
                    return self.send_missing(f"Invalid rev id: {revision}", "RevisionNotFound")
                return answer(repo, repo_id, rest, parse_qs(url.query))
        return self.send_missing("Not found", "EntryNotFound")

    do_HEAD = do_GET

    def answer_card(self, repo: Repo, repo_id: str, _rest: str, _query: dict) -> None:
        """Answer /api/models/ID."""
        self.send_json(200, repo.card(repo_id))

    def answer_tree(self, repo: Repo, _repo_id: str, under: str, query: dict) -> None:
        """Answer /api/models/ID/tree/REVISION/FOLDER."""
        recursive = query.get("recursive", ["false"])[0].lower() in ("true", "1")
        entries = repo.tree(under, recursive)
        if under and not entries:
            return self.send_missing("Entry not found", "EntryNotFound")
        return self.send_json(200, entries)

    def answer_file(self, repo: Repo, _repo_id: str, name: str, _query: dict) -> None:
        """Answer /ID/resolve/REVISION/FILE, whole or the range that is asked for."""
        path = repo.file(name)
        if path is None:
            return self.send_missing("Entry not found", "EntryNotFound")
        size = path.stat().st_size
        start, end, code = 0, size - 1, 200
        if match := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            start, end, code = int(match[1]), min(int(match[2] or size - 1), size - 1), 206
            if start > end:
                return self.send_head(416, 0, {"Content-Range": f"bytes */{size}"})
        headers = {"ETag": f'"{tag(path)}"', "X-Repo-Commit": repo.commit(), "Accept-Ranges": "bytes"}
        if code == 206:
            headers["Content-Range"] = f"bytes {start}-{end}/{size}"
        self.send_head(code, end - start + 1, {"Content-Type": "application/octet-stream", **headers})
        if self.command == "GET":
            self.send_part(path, start, end - start + 1)
        return None

    def send_part(self, path: Path, start: int, left: int) -> None:
        """Send so many bytes of a file."""
        with path.open("rb") as file:
            file.seek(start)
            while left > 0:
                chunk = file.read(min(CHUNK, left))
                if not chunk:  # the file became shorter: the promised length cannot be met
                    self.close_connection = True
                    return
                self.wfile.write(chunk)
                left -= len(chunk)

    def send_head(self, code: int, length: int, headers: dict[str, str]) -> None:
        """Send the status line and the headers."""
        self.send_response(code)
        for key, value in {**headers, "Content-Length": str(length)}.items():
            self.send_header(key, value)
        self.end_headers()

    def send_json(self, code: int, body: object, headers: dict[str, str] | None = None) -> None:
        """Send a JSON document."""
        data = json.dumps(body).encode()
        self.send_head(code, len(data), {"Content-Type": "application/json", **(headers or {})})
        if self.command == "GET":
            self.wfile.write(data)

    def send_missing(self, what: str, code: str) -> None:
        """Send a 404 with the headers by which huggingface_hub tells its exceptions apart."""
        self.send_json(404, {"error": what}, {"X-Error-Code": code, "X-Error-Message": what})


def serve(root: Path, port: int) -> None:
    """Serve until killed."""
    if not root.is_dir():
        raise SystemExit(f"{root} is not a folder")
    handler = type("Handler", (Handler,), {"root": root.resolve()})
    with ThreadingHTTPServer(("127.0.0.1", port), handler) as server:
        server.serve_forever()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--root", type=Path, required=True)
    parser.add_argument("--port", type=int, default=8090)
    args = parser.parse_args()
    serve(args.root, args.port)

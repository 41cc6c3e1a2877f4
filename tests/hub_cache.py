"""Data sets as on the hub, without a network: a cache in the hub's own layout, a small hub, a server of files."""

import hashlib
import http.server
import io
import json
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import ClassVar

import pandas as pd

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def card(*configs: str) -> str:
    """A dataset card: for each config, the splits of its folder, and class names of the column ``label``."""
    entries, infos = [], []
    for config in configs:
        entries.append(
            f"- config_name: {config}\n  data_files:\n"
            + "".join(
                f"  - {{split: {split}, path: {config}/{split}.parquet}}\n" for split in ("train", "validation", "test")
            )
        )
        infos.append(
            f"- config_name: {config}\n  features:\n  - {{name: text, dtype: string}}\n"
            f"  - name: label\n    dtype: {{class_label: {{names: {{'0': bad, '1': good}}}}}}\n"
        )
    return f"---\nconfigs:\n{''.join(entries)}dataset_info:\n{''.join(infos)}---\n"


def parquet(table: pd.DataFrame) -> bytes:
    buffer = io.BytesIO()
    table.to_parquet(buffer, index=False)
    return buffer.getvalue()


def write_hub_cache(cache: Path, repository: str, files: Mapping[str, bytes | str]) -> Path:
    """Writes a repository as ``snapshot_download`` leaves it: blobs, and a snapshot of links to them.

    Args:
        cache: the folder ``hub`` in ``HF_HOME``.
        repository: OWNER/NAME.
        files: content of each file, by its path in the repository.

    Returns:
        The snapshot's folder.
    """
    folder = cache / f"datasets--{repository.replace('/', '--')}"
    snapshot = folder / "snapshots" / COMMIT
    for name in ("blobs", "refs"):
        (folder / name).mkdir(parents=True)
    (folder / "refs" / "main").write_text(COMMIT)
    for name, content in files.items():
        blob = folder / "blobs" / _id(_bytes(content))
        blob.write_bytes(_bytes(content))
        link = snapshot / name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    return snapshot


def _bytes(content: bytes | str) -> bytes:
    return content.encode() if isinstance(content, str) else content


def _id(content: bytes) -> str:
    """The id of a file's content, as git computes it."""
    return hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()


class Silent(http.server.BaseHTTPRequestHandler):
    """A handler that prints nothing."""

    def log_message(self, *_: object) -> None:
        pass


class HubServer(Silent):
    """The part of the hub's interface that ``snapshot_download`` uses, for one data set and one that is gated."""

    repository, gated = "me/films", "me/gated"
    files: ClassVar[dict[str, bytes]] = {}

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.split("?")[0].removeprefix("/api")
        if path.startswith(f"/datasets/{self.gated}"):
            self._answer(403, b"", {"X-Error-Code": "GatedRepo"})
        elif path == f"/datasets/{self.repository}/revision/main":
            self._answer(200, json.dumps({"id": self.repository, "sha": COMMIT}).encode())
        elif path == f"/datasets/{self.repository}/tree/{COMMIT}":
            sizes = [{"type": "file", "path": n, "size": len(c), "oid": _id(c)} for n, c in self.files.items()]
            self._answer(200, json.dumps(sizes).encode())
        elif path.startswith(f"/datasets/{self.repository}/resolve/{COMMIT}/"):
            content = self.files[path.split(COMMIT + "/")[1]]
            self._answer(200, content, {"ETag": f'"{_id(content)}"', "X-Repo-Commit": COMMIT})
        else:
            self._answer(404, b"", {"X-Error-Code": "RepoNotFound"})

    def _answer(self, status: int, content: bytes, headers: Mapping[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)


class SilentFiles(Silent, http.server.SimpleHTTPRequestHandler):
    """Serves the files of a folder."""


def hub_server(files: Mapping[str, bytes | str]) -> AbstractContextManager[str]:
    """A hub at the address that it gives, with these files as the data set ``me/films``."""
    HubServer.files = {name: _bytes(content) for name, content in files.items()}
    return _serving(HubServer)


def file_server(folder: Path) -> AbstractContextManager[str]:
    """A web server at the address that it gives, with the files of a folder."""
    return _serving(partial(SilentFiles, directory=str(folder)))


@contextmanager
def _serving(handler: Callable[..., http.server.BaseHTTPRequestHandler]) -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()

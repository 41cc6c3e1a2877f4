"""The network: whether a host can be reached, told within seconds, and downloads with a checksum."""

import functools
import hashlib
import http.client
import threading
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import constants, hf_hub_download
from huggingface_hub.errors import LocalEntryNotFoundError
from tqdm import tqdm  # type: ignore[import-untyped]

from finetuning.errors import UserError, first_line

PROBE_SECONDS = 6.0  # with what follows, a missing network is reported within 10 seconds


@dataclass(frozen=True)
class Archive:
    """A file to download, and the MD5 checksum it must have."""

    url: str
    md5: str


def require_hub(what: str, instead: str) -> None:
    """Make sure, within seconds, that the Hugging Face hub can be reached, before anything starts to retry.

    Args:
        what: what is wanted from there, for the message.
        instead: what else the user may give.

    Raises:
        UserError: it cannot be reached.
    """
    require_host(constants.ENDPOINT, what, instead, allowed=not constants.HF_HUB_OFFLINE)


def require_host(url: str, what: str, instead: str, allowed: bool = True) -> None:
    """The same for any host; with ``allowed`` False it counts as out of reach."""
    answered = threading.Event()

    def ask() -> None:
        try:
            urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=PROBE_SECONDS).close()
        except urllib.error.HTTPError:
            pass  # an error page is an answer
        except (OSError, ValueError, http.client.HTTPException):
            return
        answered.set()

    if allowed:
        # In a thread, because no timeout covers the name service, nor several addresses tried in turn.
        probe = threading.Thread(target=ask, daemon=True)
        probe.start()
        probe.join(PROBE_SECONDS)
    if not answered.is_set():
        raise UserError(f"{what} is not on this machine and {url} cannot be reached: give {instead}")


def hub_file(repository: str, filename: str, instead: str = "--data_dir PATH") -> Path:
    """A file of a data set on the hub, from the cache if it is there; without a hub, ``instead`` is what to give."""
    fetch = functools.partial(hf_hub_download, repository, filename, repo_type="dataset")
    try:
        return Path(fetch(local_files_only=True))
    except LocalEntryNotFoundError:
        require_hub(f"the data set {repository}", instead)
    try:
        return Path(fetch())
    except Exception as error:  # the hub's own errors and those of the HTTP library beneath it, which changes
        reason = first_line(error)
        raise UserError(f"the data set {repository} cannot be downloaded ({reason}): give --data_dir PATH") from error


def download(archive: Archive, target: Path) -> None:
    """Writes the archive to ``target``, with a progress bar.

    Raises:
        UserError: it cannot be downloaded, or arrived damaged.
    """
    digest = hashlib.md5(usedforsecurity=False)
    try:
        with urllib.request.urlopen(archive.url, timeout=30) as response, target.open("wb") as file:
            size = int(response.headers.get("Content-Length", 0)) or None
            with tqdm(total=size, unit="B", unit_scale=True, desc=archive.url.rsplit("/", 1)[-1]) as bar:
                while chunk := response.read(1 << 20):
                    file.write(chunk)
                    digest.update(chunk)
                    bar.update(len(chunk))
    except (OSError, http.client.HTTPException) as error:
        raise UserError(f"{archive.url} cannot be downloaded ({error}): give --data_dir PATH or --offline") from error
    if digest.hexdigest() != archive.md5:
        raise UserError(f"{archive.url} arrived damaged (MD5 {digest.hexdigest()}, expected {archive.md5}): try again")

"""The network: checks within seconds whether a host answers, and downloads files with a checksum."""

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

PROBE_SECONDS = 6.0  # so that a missing network is reported within 10 seconds in all


@dataclass(frozen=True)
class Archive:
    """A file to download, and its MD5 checksum."""

    url: str
    md5: str


def require_hub(what: str, instead: str) -> None:
    """Checks within seconds that the Hugging Face hub answers, because its library would retry for minutes.

    Args:
        what: what is needed from the hub, for the message.
        instead: the flags that the message advises.

    Raises:
        UserError: the hub cannot be reached.
    """
    require_host(constants.ENDPOINT, what, instead, allowed=not constants.HF_HUB_OFFLINE)


def require_host(url: str, what: str, instead: str, allowed: bool = True) -> None:
    """Like ``require_hub``, for any host. With ``allowed`` False the host counts as unreachable."""
    answered = threading.Event()

    def send_request() -> None:
        try:
            urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=PROBE_SECONDS).close()
        except urllib.error.HTTPError:
            pass  # the host answered, if only with an error page
        except (OSError, ValueError, http.client.HTTPException):
            return
        answered.set()

    if allowed:
        # In a thread, because the timeout covers neither the DNS lookup nor several addresses tried in turn.
        probe = threading.Thread(target=send_request, daemon=True)
        probe.start()
        probe.join(PROBE_SECONDS)
    if not answered.is_set():
        raise UserError(f"{what} is not on this machine, and {url} cannot be reached: give {instead}")


def hub_file(repository: str, filename: str, instead: str = "--data_dir PATH") -> Path:
    """The local path of a hub data set's file, downloaded if the cache does not have it.

    Args:
        repository: the data set's hub id.
        filename: the file's path in the repository.
        instead: the flags to advise if the hub cannot be reached.

    Raises:
        UserError: the file cannot be downloaded.
    """
    fetch = functools.partial(hf_hub_download, repository, filename, repo_type="dataset")
    try:
        return Path(fetch(local_files_only=True))
    except LocalEntryNotFoundError:
        require_hub(f"the data set {repository}", instead)
    try:
        return Path(fetch())
    except Exception as error:  # errors of the hub and of its HTTP library, which changes between versions
        reason = first_line(error)
        raise UserError(f"the data set {repository} cannot be downloaded ({reason}): give --data_dir PATH") from error


def download(archive: Archive, target: Path) -> None:
    """Writes the archive to ``target`` and shows a progress bar.

    Raises:
        UserError: the download failed, or the checksum differs.
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
        raise UserError(
            f"{archive.url} arrived damaged: its MD5 is {digest.hexdigest()}, must be {archive.md5}: try again"
        )

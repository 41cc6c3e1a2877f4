"""The network: checks within seconds whether a host answers, and downloads files with a checksum."""

import functools
import hashlib
import http.client
import ssl
import threading
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from huggingface_hub import constants, hf_hub_download, snapshot_download
from huggingface_hub.errors import GatedRepoError, HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError
from tqdm import tqdm  # type: ignore[import-untyped]

from finetuning.errors import UserError, first_line

PROBE_SECONDS = 6.0  # so that a missing network is reported within 10 seconds in all


@dataclass(frozen=True)
class Archive:
    """A file to download, and its MD5 checksum."""

    url: str
    md5: str


def require_hub(what: str, instead: str, state: str = "not") -> None:
    """Checks within seconds that the Hugging Face hub answers, because its library would retry for minutes.

    Args:
        what: what is needed from the hub, for the message.
        instead: the flags that the message advises.
        state: whether it is not or only partly on this machine.

    Raises:
        UserError: the hub cannot be reached.
    """
    require_host(constants.ENDPOINT, what, instead, allowed=not constants.HF_HUB_OFFLINE, state=state)


def require_host(url: str, what: str, instead: str, allowed: bool = True, state: str = "not") -> None:
    """Like ``require_hub``, for any host. With ``allowed`` False the host counts as unreachable."""
    answered = threading.Event()

    def send_request() -> None:
        try:
            urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=PROBE_SECONDS).close()
        except urllib.error.HTTPError:
            pass  # the host answered, if only with an error page
        except urllib.error.URLError as error:
            if not isinstance(error.reason, ssl.SSLError):  # the hub's client has certificates of its own
                return
        except (OSError, ValueError, http.client.HTTPException):
            return
        answered.set()

    if allowed:
        # In a thread, because the timeout covers neither the DNS lookup nor several addresses tried in turn.
        probe = threading.Thread(target=send_request, daemon=True)
        probe.start()
        probe.join(PROBE_SECONDS)
    if not answered.is_set():
        raise UserError(f"{what} is {state} on this machine, and {url} cannot be reached: give {instead}")


def hub_file(repository: str, filename: str, instead: str = "--data_dir PATH") -> Path:
    """The local path of a hub data set's file, downloaded if the cache does not have it.

    Args:
        instead: the flags to advise if it cannot be downloaded.

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
        raise UserError(f"the data set {repository} cannot be downloaded ({reason}): give {instead}") from error


def hub_snapshot(
    flag: str,
    repository: str,
    offline: bool,
    instead: str,
    is_complete: Callable[[Path], bool],
    repo_type: Literal["model", "dataset"],
    patterns: list[str] | None = None,
) -> Path:
    """The folder with the files of a repository, from the hub's cache if it is complete there.

    Args:
        flag: the flag and its value, for messages.
        offline: never use the network; the cache is then taken as it is.
        instead: the flags to advise if the hub cannot be reached.
        is_complete: whether a folder of the cache has all that is needed, so that the hub need not be asked.
        patterns: the files to download; ``None`` downloads all.

    Raises:
        UserError: it does not exist, is not in the cache and cannot be downloaded, or needs permission.
    """
    below = ["*/*"] if repo_type == "model" else None  # of a model, folders hold it in forms that nobody reads here
    fetch = functools.partial(
        snapshot_download, repository, repo_type=repo_type, allow_patterns=patterns, ignore_patterns=below
    )
    try:
        cached = Path(fetch(local_files_only=True))
        if is_complete(cached):
            return cached
        state = "only partly"
    except LocalEntryNotFoundError as error:  # newer clients know which files there are
        state = "only partly" if hasattr(error, "snapshot_path") else "not"
    except HFValidationError:
        raise UserError(f"{flag}: is no hub id, and no folder has this name") from None
    if offline:
        raise UserError(f"{flag} is {state} in the hub's cache, and --offline was given: --prefetch it first")
    require_hub(flag, instead, state)
    try:
        return Path(fetch())
    except GatedRepoError:
        raise UserError(f"{flag}: the hub asks you to accept its terms, and to log in, first") from None
    except RepositoryNotFoundError:
        raise UserError(f"{flag}: the hub has no such {repo_type}, or it is private") from None
    except Exception as error:  # the hub's client does not catch the errors of its HTTP library
        raise UserError(f"{flag} could not be downloaded: {first_line(error)}") from None


def download(archive: Archive, target: Path) -> None:
    """Writes the archive to ``target`` with a progress bar, refused if the download fails or the checksum differs."""
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

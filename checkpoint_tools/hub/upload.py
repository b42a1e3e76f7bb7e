"""A model directory sent to a hub by huggingface_hub's own functions, in one commit: whole or not there.

Large files are sent before the commit that names them, and the hub knows them by their SHA-256: after an interruption
the same call sends those that it does not have. What a reader of the repository sees is the old model or the new one.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import huggingface_hub
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HFValidationError, OfflineModeIsEnabled, RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id

from checkpoint_tools.hub.card import is_untouched
from checkpoint_tools.hub.folder import CARD, ModelFolder
from engine.checkpointing.export_sums import LIST
from engine.checkpointing.provenance import FILE, version

MAIN = "main"
# Files that say something of the weights: those of an earlier model go when a new one takes its place.
_OF_WEIGHTS = (".safetensors", ".safetensors.index.json", ".sums", LIST, FILE)
_SAYS = {
    401: "the hub does not know the access token (401): make one with write access and give it as HF_TOKEN",
    403: "the access token may not do this (403): give one with write access to {owner} as HF_TOKEN",
    404: "the hub has no such place (404): is {repo} spelled as you mean it, and may the token see it?",
    429: "the hub takes no more requests for now (429): wait some minutes",
}


@dataclass(frozen=True)
class Hub:
    """A repository of models that may be written, and the token that lets us."""

    api: HfApi
    token: str
    repo: str  # OWNER/NAME
    private: bool
    branch: str
    exists: bool


def check_name(repo: str, flag: str) -> None:
    """ValueError for what can be no OWNER/NAME on the hub."""
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise ValueError(f"{flag} {repo} is no name of a repository: {error}") from None
    if "/" not in repo:
        raise ValueError(f"{flag} {repo} lacks its owner: give OWNER/NAME, the owner a user or an organisation")


def open_hub(repo: str, *, private: bool = False, branch: str = MAIN, flag: str = "--repo") -> Hub:
    """A repository that is ours or still free, found with the token of the environment or the library's login.

    Nothing is made or changed. ValueError, in one sentence, where it cannot be published to.
    """
    check_name(repo, flag)
    token = huggingface_hub.get_token()
    if not token:
        raise ValueError(
            f"{flag} {repo} needs an access token of the hub with write access: set HF_TOKEN, or run `hf auth login`"
        )
    api = HfApi(token=token, library_name="lathe", library_version=version())
    with speaking(repo, token, "checked"):
        us = api.whoami()
        try:
            found: Any = api.model_info(repo)
        except RepositoryNotFoundError as error:
            if error.response.status_code != 404:  # the library takes 401 for this as well
                raise
            found = None
    if (role := us.get("auth", {}).get("accessToken", {}).get("role")) == "read":
        raise ValueError(f"{flag} {repo}: the access token may only read; give one with write access as HF_TOKEN")
    owner, ours = repo.split("/")[0], [us["name"], *(one["name"] for one in us.get("orgs", []))]
    # A token for chosen places may write to organisations that the hub does not list for it: then the upload shows it.
    lists_all = "orgs" in us and role != "fineGrained"
    if lists_all and owner.lower() not in [name.lower() for name in ours]:
        raise ValueError(f"{flag} {repo}: the owner is {owner}, and the token is of {', '.join(ours)}")
    if found is not None and private and not found.private:
        raise ValueError(
            f"--private: {repo} exists and everybody can read it; make it private on the hub, or leave --private out"
        )
    return Hub(api, token, repo, private, branch, found is not None)


def send(hub: Hub, folder: ModelFolder, card: str | None, again: str | None = None) -> str:
    """Sends a folder, with this card where it has none of its own; returns the address of what is there now.

    Prints what is removed or kept there. ValueError, in one sentence, where the hub or the way to it fails; `again` is
    what goes on then, where it is not the same command.
    """
    with speaking(hub.repo, hub.token, "published", again):
        if not hub.exists:
            hub.api.create_repo(hub.repo, private=hub.private or None, exist_ok=True)
        if hub.branch != MAIN:
            hub.api.create_branch(hub.repo, branch=hub.branch, exist_ok=True)
        there = hub.api.list_repo_files(hub.repo, revision=hub.branch)
        operations: list[Any] = [CommitOperationAdd(name, folder.path / name) for name in folder.files]
        if card is not None and CARD in there and not is_untouched(_card_there(hub)):
            print(f"{CARD} of {hub.repo} was edited there and is kept; to replace it, put your own into {folder.path}")
        elif card is not None:
            operations.append(CommitOperationAdd(CARD, card.encode()))
        beside = [name for name in there if "/" not in name and name not in folder.files]
        if stale := [name for name in beside if name.endswith(_OF_WEIGHTS)]:
            operations += map(CommitOperationDelete, stale)
            print(f"removed from {hub.repo}, as they are no part of this model: {', '.join(stale)}")
        message = f"Publish {folder.path.absolute().name} with Lathe {version()}"
        hub.api.create_commit(hub.repo, operations, commit_message=message, revision=hub.branch)
    return f"{hub.api.endpoint}/{hub.repo}" + ("" if hub.branch == MAIN else f"/tree/{hub.branch}")


def _card_there(hub: Hub) -> str:
    with tempfile.TemporaryDirectory() as folder:
        file = hub.api.hf_hub_download(hub.repo, CARD, revision=hub.branch, local_dir=folder)
        return Path(file).read_bytes().decode("utf-8", errors="replace")


@contextmanager
def speaking(repo: str, token: str, done: str, again: str | None = None) -> Iterator[None]:
    """What the library raises becomes one sentence, and neither that nor what it logs shows the token."""
    handlers, hiding = list(logging.getLogger("huggingface_hub").handlers), _Hiding(token)
    for handler in handlers:
        handler.addFilter(hiding)
    try:
        yield
    except Exception as error:
        _say(error, repo, token, done, again)
    finally:
        for handler in handlers:
            handler.removeFilter(hiding)


class _Hiding(logging.Filter):
    """Takes the token out of what is logged: a server may repeat it."""

    def __init__(self, token: str):
        super().__init__()
        self._token = token

    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = record.getMessage().replace(self._token, "[token]"), None
        return True


def _say(error: Exception, repo: str, token: str, done: str, again: str | None) -> NoReturn:
    """Raises ValueError with what an error of the hub, or of the way there, means, and how it goes on."""
    chain: list[Any] = [error]
    while cause := chain[-1].__cause__:  # the library wraps what goes wrong with one file
        chain.append(cause)
    response = next((one.response for one in chain if getattr(one, "response", None) is not None), None)
    status = getattr(response, "status_code", None)
    kind = type(chain[-1]).__name__
    words = next((str(one.server_message) for one in chain if getattr(one, "server_message", None)), "")
    passes = status is not None and (status == 429 or status >= 500)  # what may be gone the next time
    if any(isinstance(one, OfflineModeIsEnabled) for one in chain):
        why = "HF_HUB_OFFLINE is set; take it out of the environment"
    elif status is not None:
        why = _SAYS.get(status, f"the hub {'failed' if status >= 500 else 'refused it'} ({status})")
        why = why.format(repo=repo, owner=repo.split("/")[0])
    elif isinstance(chain[-1], ValueError):
        why = (str(chain[-1]).strip() or kind).splitlines()[0]
    elif isinstance(chain[-1], OSError) and chain[-1].filename:  # a file of ours
        why = f"{chain[-1].strerror}: {chain[-1].filename}"
    else:
        why, passes = f"the connection to the hub broke ({kind})", True
    if words and status is not None and status < 500:
        why += f"; it says: {' '.join(words.split())[:200]}"
    if again or passes:
        why += f"; {again or 'the same command'} goes on, and sends what the hub lacks"
    raise ValueError(f"{repo} could not be {done}: {why.replace(token, '[token]')}") from None

"""Models on the Hugging Face hub: `hub:NAME` or `hub:NAME@REVISION` becomes a local folder, and errors take one line.

A name of the hub is USER/MODEL; a revision is a branch, a tag or a commit.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlparse
from urllib.request import getproxies

from spvit.errors import HubError

HUB = "hub:"


def downloaded(name: str | Path, first: str, *others: str) -> Path:
    """Return a folder, or for hub:NAME[@REVISION] where these files of it were downloaded to, all of one commit.

    Nothing but these files is asked for. What is in the client's cache is not downloaded again, and serves offline.

    Raises:
        HubError: the hub cannot be reached, has no such model, or does not let this user read it.
    """
    if not str(name).startswith(HUB):
        return Path(name)
    from huggingface_hub import hf_hub_download

    model, _, revision = str(name).removeprefix(HUB).partition("@")
    spare_retries()
    with hub_errors(str(name).removeprefix(HUB)):
        found = Path(hf_hub_download(model, first, revision=revision or None))
        for other in others:
            hf_hub_download(model, other, revision=found.parent.name)
    return found.parent


@contextmanager
def hub_errors(name: str) -> Iterator[None]:
    """Turn what the hub's client raises inside into a HubError: what was wrong with a name, and what to do."""
    from huggingface_hub import errors

    log_in = "log in (hf auth login) or set HF_TOKEN"
    unreached = f"the hub cannot be reached, and {name} is not in its cache here; connect, or name a folder"
    words = {  # the special before the general
        errors.GatedRepoError: f"{name} is gated on the hub; ask for access on its page there, then {log_in}",
        errors.RepositoryNotFoundError: f"the hub has no {name} that you may read; check the name, or {log_in}",
        errors.RevisionNotFoundError: f"{name}: the hub has no such revision; leave out @ for the newest",
        errors.LocalEntryNotFoundError: unreached,
        errors.EntryNotFoundError: f"{name} on the hub holds no model of spvit; one of transformers opens as hf:{name}",
        errors.HFValidationError: f"{name!r} is no name on the hub, expected USER/MODEL",
        errors.OfflineModeIsEnabled: unreached,
    }
    try:
        yield
    except HubError:
        raise
    except Exception as error:  # its HTTP library, which others than this client use, has been another one before
        said = next((own for kind, own in words.items() if isinstance(error, kind)), None)
        status = getattr(getattr(error, "response", None), "status_code", None)
        if said is None and status in (401, 403):
            said = f"the hub refuses this for {name}; check that you own it and that your token may write, or {log_in}"
        said = said or f"the hub failed for {name}: {next(iter(str(error).splitlines()), type(error).__name__)}"
        raise HubError(said) from error


def spare_retries() -> bool:
    """Return whether the hub's server is known. If not tell its client, which would try for a minute, not its cache."""
    from huggingface_hub import constants
    from huggingface_hub.utils import logging

    logging.set_verbosity_error()
    if not getproxies():
        try:
            socket.getaddrinfo(urlparse(constants.ENDPOINT).hostname, 443)
        except OSError:
            constants.HF_HUB_OFFLINE = True
    return not constants.HF_HUB_OFFLINE

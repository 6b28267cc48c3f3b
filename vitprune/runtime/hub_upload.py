"""Uploads a checkpoint to the Hub; and says before there is one whether it may be."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi, constants
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError
from huggingface_hub.utils import validate_repo_id

from vitprune.recipe.errors import first_line
from vitprune.runtime.files import contents
from vitprune.runtime.hub_cache import Disconnected

LOG_IN = "log in with `hf auth login`, or set HF_TOKEN to a token that may write"
CAN_WRITE = ("admin", "write", "contributor")


def require_rights(repo: str) -> None:
    """Raise ValueError, with the way out, where a repository `user/name` can't be written to, as far as can be told."""
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise ValueError(f"{repo!r} is no name for a repository: {first_line(error)}; write user/name") from error
    if repo.count("/") != 1:
        raise ValueError(f"{repo!r} doesn't say whose it is; write user/name")
    if constants.HF_HUB_OFFLINE:
        raise ValueError(f"{repo} can't be written to, as HF_HUB_OFFLINE is set; unset it, or push later")
    try:
        who: Mapping[str, Any] = HfApi().whoami()
    except LocalTokenNotFoundError as error:
        raise ValueError(f"{repo} can't be written to, as no token of the Hub is there; {LOG_IN}") from error
    except HfHubHTTPError as error:
        if error.response is not None and error.response.status_code == 401:
            raise ValueError(f"{repo} can't be written to, as the Hub doesn't take the token; {LOG_IN}") from error
        raise ValueError(f"the Hub doesn't answer ({first_line(error)}); try again, or push later") from error
    except (OSError, Disconnected) as error:
        raise ValueError(f"the Hub can't be reached ({first_line(error)}); push later") from error
    if who.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise ValueError(f"{repo} can't be written to, as the token may only read; {LOG_IN}")
    _require_namespace(repo, who)


def _require_namespace(repo: str, who: Mapping[str, Any]) -> None:
    """Raise ValueError where a repository is neither the user's nor that of an organisation whose members may write."""
    owner, name = repo.split("/")[0], str(who.get("name"))
    roles = {str(org.get("name")): str(org.get("roleInOrg", "write")) for org in who.get("orgs", ())}
    if owner == name or roles.get(owner) in CAN_WRITE:
        return
    own = ", ".join([name, *(org for org, role in roles.items() if role in CAN_WRITE)])
    trouble = f"may only {roles[owner]} in" if owner in roles else "is no member of"
    raise ValueError(f"{repo} can't be written to, as {name} {trouble} {owner}; write for {own}, or with another token")


def upload(folder: Path, repo: str, *, private: bool, instead: Mapping[str, str], message: str) -> str:
    """Put a folder's files into a repository, which is made if it isn't there, in one commit; return its address.

    instead: text by name in place of a file's own.

    Raises OSError with the way out where that fails; the repository is as it was, or new and empty.
    """
    api = HfApi()
    # where the folder is a volume, other things of the run lie in it
    files = (file for entry in contents(folder) for file in ([entry] if entry.is_file() else entry.rglob("*")))
    names = sorted(file.relative_to(folder).as_posix() for file in files if file.is_file())
    added = [
        CommitOperationAdd(name, instead[name].encode() if name in instead else str(folder / name)) for name in names
    ]
    try:
        place = api.create_repo(repo, private=private, exist_ok=True)
        api.create_commit(repo, added, commit_message=message)
    except (OSError, Disconnected) as error:
        raise OSError(f"{repo} wasn't written to: {first_line(error)}") from error
    return str(place)

"""`--push-to-hub NAME`: the exported model to a repository of the hub, once it is whole."""

from __future__ import annotations

import re
from pathlib import Path

from pipeline.errors import FatalError, InputError

NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")


def check_push(name: str) -> None:
    """Refuse what would fail after hours of training.

    Raises:
        InputError: no possible name of a repository, or no token.
    """
    from huggingface_hub import get_token

    if not NAME.fullmatch(name):
        raise InputError(f"--push-to-hub: {name!r} is no name of a repository; write OWNER/NAME")
    if get_token() is None:
        raise InputError("--push-to-hub: no token of the hub is stored here; run `hf auth login`, or set HF_TOKEN")


def push(folder: Path, name: str) -> str:
    """Upload a folder to the repository `name`, which is made, private, if it does not exist; returns its address.

    Raises:
        FatalError: the hub does not take it. The folder is untouched.
    """
    from huggingface_hub import HfApi

    hub = HfApi()
    try:
        address = hub.create_repo(name, private=True, exist_ok=True)
        hub.upload_folder(
            repo_id=address.repo_id, folder_path=folder, commit_message="Model of an unlearning run, with its card"
        )
    except Exception as error:  # the types depend on the HTTP library that the client is built on
        reason = " ".join(str(error).split())[:300]
        raise FatalError(
            f"--push-to-hub: {folder} is whole, but the hub does not take it: {reason}; later: hf upload {name} "
            f"{folder}"
        ) from error
    return str(address)

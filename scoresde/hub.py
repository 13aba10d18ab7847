"""A checkpoint's folder to and from the Hugging Face hub, with the extra `hub`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

__all__ = ["download", "module", "upload"]

ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
PATTERNS = ["*.safetensors", "*.json"]  # nothing that runs, and nothing that load does not read


def module(name: str) -> Any:
    """huggingface_hub, once `name` can be an id of it."""
    if not ID.fullmatch(name) or ".." in name:
        raise FileNotFoundError(f"{name} is no folder, and no hub id; wanted a path that exists, or owner/name")
    try:
        import huggingface_hub
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{name} is no folder here, and a hub id needs huggingface_hub: pip install 'scoresde[hub]'", name=error.name
        ) from error
    return huggingface_hub


def download(name: str, revision: str | None = None) -> Path:
    """The folder of the hub's cache with the .safetensors and .json files of this id, whose files are links."""
    return Path(module(name).snapshot_download(repo_id=name, revision=revision, allow_patterns=PATTERNS))


def upload(folder: Path, name: str, files: Sequence[str]) -> None:
    """These files of the folder, as one commit to this id, which is made if missing."""
    api = module(name).HfApi()
    api.create_repo(repo_id=name, exist_ok=True)
    api.upload_folder(repo_id=name, folder_path=str(folder), allow_patterns=list(files))

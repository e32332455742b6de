"""Models on a hub: fetched into the cache that all of Hugging Face's libraries share, and uploaded when they are done.

Where the hub is, which token is used, where the cache lies and whether there is a network follow HF_ENDPOINT, HF_TOKEN,
HF_HOME and HF_HUB_OFFLINE, as everywhere.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from minipuzzle.errors import MinipuzzleError

_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w./-]+)?")
# What a checkpoint is made of here; repositories hold the same weights in other formats too.
_NEEDED = ("config.json", "model*.safetensors", "*.safetensors.index.json", "hf_quant_config.json", "README.md")
_OURS = ("minipuzzle.json", "plan.json", "digests.json", "minipuzzle/*")
_NOT_UPLOADED = ("*.unfinished", ".writer", ".cache/*", "minipuzzle/places.json")  # the last: of this machine


def is_hub_id(name: str | Path) -> bool:
    """Whether a name can only be that of a model on a hub: ``org/name`` or ``org/name@revision``, and nothing there."""
    return _ID.fullmatch(str(name)) is not None and not Path(name).exists() and not Path(name).parent.is_dir()


def fetched(hub_id: str, companions: Sequence[str] = (), *, has_weights: bool = True) -> Path:
    """The folder in the cache that holds a model of the hub; what is missing there is downloaded, or its rest.

    ``companions``: further files, where there are any. ``has_weights``: else config.json alone.

    Raises: MinipuzzleError if there is no such model or revision, no right to it, or no network.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

    repository, _, revision = hub_id.partition("@")
    patterns = [*_NEEDED, *_OURS, *companions] if has_weights else ["config.json"]
    try:
        return Path(snapshot_download(repository, revision=revision or None, allow_patterns=patterns))
    except RevisionNotFoundError:
        raise MinipuzzleError(f"{repository} has no revision {revision}", "give a branch, a tag or a commit") from None
    except (RepositoryNotFoundError, HFValidationError):
        raise MinipuzzleError(
            f"{hub_id} is neither a folder nor a model on the hub that may be read",
            "check the name; for a private or gated model log in with `hf auth login`",
        ) from None
    except Exception as error:
        raise MinipuzzleError(f"cannot fetch {hub_id}: {error}", _network_hint(error)) from None


def _network_hint(error: Exception) -> str:
    from huggingface_hub.errors import LocalEntryNotFoundError

    if isinstance(error, LocalEntryNotFoundError):
        return "it is not whole in the cache: allow the network (HF_HUB_OFFLINE=0), or give a folder"
    return "give the command again: what has been fetched is kept"


def push(folder: Path, name: str) -> str:
    """Upload a finished folder into a repository, which is made (private) if there is none; returns its address.

    Raises: MinipuzzleError if it cannot be.
    """
    from huggingface_hub import HfApi

    try:
        api = HfApi()
        url = api.create_repo(name, private=True, exist_ok=True)
        api.upload_folder(repo_id=url.repo_id, folder_path=folder, ignore_patterns=list(_NOT_UPLOADED))
    except Exception as error:
        raise MinipuzzleError(
            f"cannot upload {folder} to {name}: {error}",
            f"the folder is finished and stays; log in with `hf auth login`, then: hf upload {name} {folder}",
        ) from None
    return str(url)

"""Upload of a folder to the Hugging Face hub, by huggingface_hub where it is installed."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from permafrost.core.errors import ConfigError, first_line, require

SCHEME = "hf://"
_WRITTEN = [
    "targets/*",
    "data/*",
    "img_emb/*",
    "metadata/*",
    "projections/*",
    "plugins/*",
    "*.parquet",
    "share.json",
]
"""Files of a share; those that a new share does not have are removed from the repository."""


def repository_of(to: str) -> str:
    """Return the name of a repository, <user>/<name>.

    Raises:
        ConfigError: If the address has another form.
    """
    name = to.removeprefix(SCHEME).strip("/")
    require(
        name.count("/") == 1 and all(name.split("/")),
        f"to={to} must be hf://<user>/<name>, the repository to create or to update",
    )
    return name


def require_hub() -> None:
    """Check that huggingface_hub is installed.

    Raises:
        ConfigError: If it is not.
    """
    try:
        import huggingface_hub  # noqa: F401
    except ImportError:
        raise ConfigError(
            "to=hf:// needs huggingface_hub; install it (pip install huggingface_hub), or set to= to a folder and "
            "upload it yourself"
        ) from None


def upload_to_hub(folder: Path, to: str, kind: Literal["dataset", "model"]) -> str:
    """Upload a folder to a repository of the hub, which is created if it is missing; return its address.

    Raises:
        ConfigError: If the hub refuses it.
    """
    import huggingface_hub

    name = repository_of(to)
    hub = huggingface_hub.HfApi()
    try:
        hub.create_repo(name, repo_type=kind, exist_ok=True)
        hub.upload_folder(
            folder_path=str(folder),
            repo_id=name,
            repo_type=kind,
            delete_patterns=_WRITTEN if kind == "dataset" else None,
        )
    except Exception as error:  # of the hub, the network or the token
        raise ConfigError(
            f"to={to}: the hub refused it ({first_line(error)}); the files are in {folder}"
        ) from error
    return f"{SCHEME}{'datasets/' if kind == 'dataset' else ''}{name}"

"""Submission of a job from a checkout: `python -m permafrost.cluster.submit ADDRESS COMMAND ...`.

It is `ray job submit` with the folder as the job's code, and first checks that the head answers, accepts the token, and
accepts an upload of this size. Each of these errors is one line.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from permafrost.cluster.placement import ClusterError
from permafrost.cluster.session import TOKEN_ADVICE, one_line
from permafrost.core.errors import UserError, printable

# The head's environment may have another state of the code installed.
_CODE = ("--working-dir", ".", "--runtime-env-json", '{"env_vars": {"PYTHONPATH": "pipeline"}}')


def submit_folder() -> None:
    """Submit the command line's command with the current folder.

    The exit code is 1 if the job fails or cannot be submitted.
    """
    address, *command = sys.argv[1:]
    try:
        _check_head(address)
        _check_size(Path.cwd())
        _submit(address, command)
    except (UserError, OSError) as error:
        sys.exit(f"make submit: error: {printable(str(error))}")


def _check_head(address: str) -> None:
    """Raise ClusterError if no Ray head answers at an address, or the head refuses the token."""
    from ray._private.authentication import authentication_token_setup
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    advice = "start a head (ray start --head), or correct ADDRESS: http://<head>:8265"
    if "://" not in address:  # Ray would wait 40 s for the control store of a cluster
        raise ClusterError(f"ADDRESS={address} is not the address of a dashboard; {advice}")
    # As `ray start` does, with a warning about a new cluster.
    authentication_token_setup.logger.setLevel(logging.ERROR)
    authentication_token_setup.maybe_enable_token_auth_if_token_available(warn_if_disabled=False)
    try:
        JobSubmissionClient(address)
    except AuthenticationError as error:
        raise ClusterError(
            f"the Ray head at {address} refuses this shell ({one_line(error)}). {TOKEN_ADVICE}"
        ) from error
    except Exception as error:  # also those of requests and of JSON, if another server answers
        raise ClusterError(
            f"no Ray head answers at ADDRESS={address} ({one_line(error)}); {advice}"
        ) from error


def _check_size(folder: Path) -> None:
    """Raise ClusterError if a folder, without the entries that Ray leaves out, is larger than a head accepts."""
    from ray._private import ray_constants
    from ray._private.runtime_env import packaging

    sizes: dict[str, int] = {}

    def add(path: Path) -> None:
        if path.is_file():
            sizes[str(path.relative_to(folder))] = path.stat().st_size

    packaging._dir_travel(
        folder,
        [packaging._get_excludes(folder, ray_constants.get_runtime_env_default_excludes())],
        add,
        include_gitignore=os.environ.get(ray_constants.RAY_RUNTIME_ENV_IGNORE_GITIGNORE) != "1",
        logger=logging.getLogger(__name__),  # Ray's own prints the names of the ignore files
    )
    total, most = sum(sizes.values()), ray_constants.DASHBOARD_CLIENT_MAX_SIZE
    if total > most:
        largest = sorted(sizes, key=lambda name: sizes[name], reverse=True)[:3]
        raise ClusterError(
            f"the job would upload {_mebibytes(total)} from {folder}, and Ray accepts {_mebibytes(most)}. The largest "
            f"files are {', '.join(f'{name} ({_mebibytes(sizes[name])})' for name in largest)}; list what the job does "
            "not need in .rayignore, and keep data and weights on storage that all nodes share"
        )


def _mebibytes(size: int) -> str:
    return f"{size / 2**20:,.1f} MiB"


def _submit(address: str, command: Sequence[str]) -> None:
    """Run `ray job submit`, which ends this process with its exit code. Raises ClusterError if it loses the head."""
    from ray.scripts.scripts import cli

    try:
        cli(["job", "submit", "--address", address, *_CODE, "--", *command])
    except Exception as error:  # Ray raises errors of requests, of aiohttp and its own
        raise ClusterError(
            f"the Ray head at {address} failed ({one_line(error)}). If it still runs, `ray job list --address "
            f"{address}` shows the job. Submit the same command again to complete what is missing"
        ) from error


if __name__ == "__main__":
    submit_folder()

"""Completion scripts of shells and the JSON Schema of experiments: `permafrost-shell completion bash`."""

from __future__ import annotations

import json
import sys

from permafrost.config.experiments import plugin_names
from permafrost.config.plugins import load_plugins
from permafrost.core.errors import ConfigError, UserError
from permafrost_shell.completion import SCRIPTS, candidates
from permafrost_shell.schema import experiment_schema


def run_script() -> None:
    """Print what the arguments name: `schema [plugins=[...]]`, `completion <shell>` or `completion words ...`."""
    try:
        _print(sys.argv[1:])
    except UserError as error:
        sys.exit(f"permafrost-shell: error: {error}")


def _print(arguments: list[str]) -> None:
    match arguments:
        case ["completion", "words", *arguments]:
            load_plugins(())
            print(*candidates(arguments), sep="\n")
        case ["completion", shell] if shell in SCRIPTS:
            print(SCRIPTS[shell], end="")
        case ["schema", *arguments]:
            load_plugins(plugin_names(arguments))
            print(json.dumps(experiment_schema(), indent=1))
        case _:
            raise ConfigError(
                "name what to print: permafrost-shell schema, or completion bash|zsh|fish"
            )


if __name__ == "__main__":
    run_script()

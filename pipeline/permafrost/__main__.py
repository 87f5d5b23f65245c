"""Command line of the project: `permafrost <verb> [key=value ...]`, or `python -m permafrost <verb> ...`."""

from __future__ import annotations

import ast
import difflib
import runpy
import sys

from permafrost.config.environment import TOP
from permafrost.config.version import __version__
from permafrost.core.interrupts import catch_signals

VERB_ORDER = (
    "preview",
    "estimate",
    "precompute",
    "ingest",
    "teach",
    "verify",
    "show",
    "distill",
    "evaluate",
    "export",
    "sweep",
    "report",
    "share",
    "attach",
    "render",
)
"""Verbs in the order in which they are used."""


def main() -> None:
    """Run the stage that the first word names. Exit codes are those of the stage, and 2 for an unknown verb."""
    verb, *words = sys.argv[1:] or ["--help"]
    if verb in ("-h", "--help", "help"):
        print(overview())
    elif verb == "--version":
        print(f"permafrost {__version__}")
    elif verb == "schema":
        _print_schema(words)
    elif verb == "completion":
        _print_completion(words)
    elif verb in VERB_ORDER:
        sys.argv = [f"permafrost {verb}", *words]
        with catch_signals() as signals:
            try:
                with signals.raising():
                    _run(verb, words)
            except KeyboardInterrupt:  # while the stage is imported; later it ends by itself
                print(signals.describe(verb), file=sys.stderr)
                sys.exit(signals.exit_code)
    else:
        close = difflib.get_close_matches(verb, VERB_ORDER, n=1)
        hint = f" (did you mean {close[0]}?)" if close else ""
        print(
            f"permafrost: error: there is no verb {verb}{hint}; choose one of: {', '.join(VERB_ORDER)}",
            file=sys.stderr,
        )
        sys.exit(2)


def _run(verb: str, words: list[str]) -> None:
    """Run a stage, which is not imported for its help and options, as that takes longer than they do."""
    is_help = bool({"-h", "--help"} & set(words))
    if is_help or ("--cfg" in words and verb != "render"):
        from permafrost.cli import stage_main as show

        show(verb, lambda config: None, _docstring(verb))
    else:
        runpy.run_path(str(TOP / "stages" / f"{verb}.py"), run_name="__main__")


def _print_schema(words: list[str]) -> None:
    """Print the JSON Schema of experiments, with the members of the plug-ins that `plugins=` names."""
    import json

    from permafrost.config.experiments import plugin_names
    from permafrost.config.plugins import load_plugins
    from permafrost.config.schema import experiment_schema

    load_plugins(plugin_names(words))
    print(json.dumps(experiment_schema(), indent=1))


def _print_completion(words: list[str]) -> None:
    """Print the script of a shell, or what may follow the words of a command line."""
    from permafrost.config.completion import SCRIPTS, candidates

    if words[:1] == ["words"]:
        print(*candidates(words[1:]), sep="\n")
    elif words in [[shell] for shell in SCRIPTS]:
        print(SCRIPTS[words[0]], end="")
    else:
        print(
            "permafrost: error: name a shell: permafrost completion bash|zsh|fish", file=sys.stderr
        )
        sys.exit(2)


def overview() -> str:
    """Return the help text: each verb with the first line of its module's docstring, without importing it."""
    lines = [f"  {verb:<11} {_docstring(verb).partition(chr(10))[0]}" for verb in VERB_ORDER]
    return "\n".join(
        [
            "Run the teachers once, distill many students.\n",
            "  permafrost <verb> [key=value ...]\n",
            *lines,
            "\npermafrost <verb> --help explains a verb and lists its options with their values.",
        ]
    )


def _docstring(verb: str) -> str:
    source = (TOP / "stages" / f"{verb}.py").read_text(encoding="utf-8")
    return ast.get_docstring(ast.parse(source)) or ""


if __name__ == "__main__":
    main()

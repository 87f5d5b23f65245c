"""Command line of the project: `permafrost <verb> [key=value ...]`, or `python -m permafrost <verb> ...`."""

from __future__ import annotations

import sys

from permafrost.config.version import __version__
from permafrost.core.interrupts import catch_signals


def main() -> None:
    """Run the verb that the first argument names. Exit codes are those of the verb, and 2 for an unknown one."""
    verb, *words = sys.argv[1:] or ["--help"]
    if verb == "--version":
        print(f"permafrost {__version__}")
        return
    with catch_signals() as signals:
        try:
            with signals.raising():
                _run(verb, words)
        except KeyboardInterrupt:  # while modules are imported; later a verb ends by itself
            print(signals.describe(verb), file=sys.stderr)
            sys.exit(signals.exit_code)


def _run(verb: str, words: list[str]) -> None:
    """Run a verb, or print what is not one: the overview, the schema of experiments, or the script of a shell."""
    from permafrost.cli import attempt, stage_main
    from permafrost.config.experiments import plugin_names
    from permafrost.config.plugins import load_plugins

    printers = {"schema": _print_schema, "completion": _print_completion}
    is_help = verb in ("-h", "--help", "help")

    def prepare() -> None:
        load_plugins(() if verb == "completion" else plugin_names(words))
        if is_help:
            print(overview())
        elif verb in printers:
            printers[verb](words)
        else:
            _require_verb(verb)

    code, message = attempt("permafrost", prepare)
    if code:
        print(message, file=sys.stderr)
        sys.exit(code)
    if not is_help and verb not in printers:
        sys.argv = [f"permafrost {verb}", *words]
        stage_main(verb)


def _require_verb(verb: str) -> None:
    from permafrost.config.suggestions import suggest
    from permafrost.config.verbs import VERBS
    from permafrost.core.errors import printable, require

    require(
        verb in VERBS,
        f"there is no verb {printable(verb)}{suggest(verb, VERBS)}; choose one of: {', '.join(VERBS)}",
    )


def _print_schema(words: list[str]) -> None:
    """Print the JSON Schema of experiments, with the members of the plug-ins that `plugins=` names."""
    import json

    from permafrost.config.schema import experiment_schema

    print(json.dumps(experiment_schema(), indent=1))


def _print_completion(words: list[str]) -> None:
    """Print the script of a shell, or the completions of a command line."""
    from permafrost.config.completion import SCRIPTS, candidates
    from permafrost.core.errors import require

    if words[:1] == ["words"]:
        print(*candidates(words[1:]), sep="\n")
        return
    require(
        words in [[shell] for shell in SCRIPTS], "name a shell: permafrost completion bash|zsh|fish"
    )
    print(SCRIPTS[words[0]], end="")


def overview() -> str:
    """Return the help text: each verb with the first line of its help."""
    from permafrost.config.verbs import VERBS

    lines = [f"  {verb:<11} {VERBS[verb].help.partition(chr(10))[0]}" for verb in VERBS]
    return "\n".join(
        [
            "Run the teachers once, distill many students.\n",
            "  permafrost <verb> [key=value ...]\n",
            *lines,
            "\npermafrost <verb> --help explains a verb and lists its options with their values.",
        ]
    )


if __name__ == "__main__":
    main()

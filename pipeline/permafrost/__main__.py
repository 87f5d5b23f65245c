"""Command line of the project: `permafrost <verb> [key=value ...]`, or `python -m permafrost <verb> ...`."""

from __future__ import annotations

import sys

from permafrost.config.environment import prepare_threads, report_nothing
from permafrost.config.version import __version__
from permafrost.core.interrupts import catch_signals


def main() -> None:
    """Run the verb that the first argument names. Exit codes are those of the verb, and 2 for an unknown one."""
    verb, *arguments = sys.argv[1:] or ["--help"]
    if verb == "--version":
        print(f"permafrost {__version__}")
        return
    prepare_threads()  # before a plug-in imports PyTorch
    report_nothing()
    with catch_signals() as signals:
        try:
            with signals.raising():
                _run(verb, arguments)
        except KeyboardInterrupt:  # while modules are imported; later a verb ends by itself
            print(signals.describe(verb), file=sys.stderr)
            sys.exit(signals.exit_code)


def _run(verb: str, arguments: list[str]) -> None:
    """Run a verb, or print the overview."""
    from permafrost.cli import attempt, stage_main
    from permafrost.config.experiments import plugin_names
    from permafrost.config.plugins import load_plugins
    from permafrost.config.suggestions import suggest
    from permafrost.config.verbs import VERBS
    from permafrost.core.errors import printable, require

    is_help = verb in ("-h", "--help", "help")

    def prepare() -> None:
        load_plugins(plugin_names(arguments))
        if is_help:
            print(overview())
        else:
            require(
                verb in VERBS,
                f"there is no verb {printable(verb)}{suggest(verb, VERBS)}; choose one of: {', '.join(VERBS)}",
            )

    code, message = attempt("permafrost", prepare)
    if code:
        print(message, file=sys.stderr)
        sys.exit(code)
    if not is_help:
        sys.argv = [f"permafrost {verb}", *arguments]
        stage_main(verb)


VERB_GROUPS = {
    "data": "Data and its store",
    "teacher": "Teacher",
    "student": "Student",
    "report": "Report and share",
}
_EXAMPLES = (
    "permafrost preview data=image_folder data.path=photos",
    "permafrost precompute --help",
    "permafrost distill --help method=kd",
)


def overview() -> str:
    """Return the help text: each verb with the first line of its help, in groups, and commands to try."""
    from permafrost.config.verbs import VERBS

    lines = [
        "Run the teachers once, distill many students.\n",
        "  permafrost <verb> [key=value ...]",
    ]
    for group in dict.fromkeys([*VERB_GROUPS, *(each.group for each in VERBS.values())]):
        if verbs := [verb for verb in VERBS if VERBS[verb].group == group]:
            lines.append(f"\n{VERB_GROUPS.get(group, group)}:")
            lines += [f"  {verb:<11} {VERBS[verb].help.partition(chr(10))[0]}" for verb in verbs]
    return "\n".join([*lines, "\nTry:", *(f"  {example}" for example in _EXAMPLES)])


if __name__ == "__main__":
    main()

"""Command line of the project: `permafrost <verb> [key=value ...]`, or `python -m permafrost <verb> ...`."""

from __future__ import annotations

import ast
import difflib
import runpy
import sys

from permafrost.config.environment import TOP
from permafrost.config.version import __version__
from permafrost.core.interrupts import catch_signals

VERBS = (
    "preview",
    "estimate",
    "precompute",
    "teach",
    "verify",
    "show",
    "distill",
    "evaluate",
    "export",
    "sweep",
    "report",
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
    elif verb in VERBS:
        sys.argv = [f"permafrost {verb}", *words]
        with catch_signals() as signals:
            try:
                with signals.raising():
                    runpy.run_path(str(TOP / "stages" / f"{verb}.py"), run_name="__main__")
            except KeyboardInterrupt:  # while the stage is imported; later it ends by itself
                print(signals.describe(verb), file=sys.stderr)
                sys.exit(signals.exit_code)
    else:
        close = difflib.get_close_matches(verb, VERBS, n=1)
        hint = f" (did you mean {close[0]}?)" if close else ""
        print(
            f"permafrost: error: there is no verb {verb}{hint}; choose one of: {', '.join(VERBS)}",
            file=sys.stderr,
        )
        sys.exit(2)


def overview() -> str:
    """Return the help text: each verb with the first line of its module's docstring, without importing it."""
    lines = [f"  {verb:<11} {_summary(verb)}" for verb in VERBS]
    return "\n".join(
        [
            "Run the teachers once, distill many students.\n",
            "  permafrost <verb> [key=value ...]\n",
            *lines,
            "\npermafrost <verb> --help explains a verb and lists its options with their values.",
        ]
    )


def _summary(verb: str) -> str:
    source = (TOP / "stages" / f"{verb}.py").read_text(encoding="utf-8")
    return (ast.get_docstring(ast.parse(source)) or "").partition("\n")[0]


if __name__ == "__main__":
    main()

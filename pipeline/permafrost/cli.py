"""Command line of a verb: parse the arguments, run the verb, and print its result or an error."""

from __future__ import annotations

import logging
import os
import re
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from pkgutil import resolve_name
from types import MappingProxyType
from typing import Any

from permafrost.config.compose import complete_arguments, compose, names_teacher
from permafrost.config.environment import (
    keep_freed_memory,
    open_closed_streams,
    ordinary_torch,
    prepare_threads,
    report_nothing,
)
from permafrost.config.experiments import plugin_names
from permafrost.config.paths import place_paths
from permafrost.config.plugins import load_plugins
from permafrost.config.sections import section_names, section_of, sections_of_verb
from permafrost.config.verbs import VERBS, build_verb_config
from permafrost.core.errors import (
    ConfigError,
    UserError,
    device_error,
    printable,
    require,
    require_name,
    with_remedy,
)
from permafrost.core.interrupts import catch_signals, check_interrupted, keep_signals
from permafrost.core.progress import TerminalHandler
from permafrost.core.yaml_text import dump_yaml
from permafrost.runs.folder import RunFolder, mirrored_run, save_options, without_remains
from permafrost.storage.lock import folder_lock

logger = logging.getLogger("permafrost.config")


class _OneLineFormatter(logging.Formatter):
    """Formatter of log messages without control characters. A block of facts is written as it is."""

    def format(self, record: logging.LogRecord) -> str:
        if getattr(record, "is_block", False):
            return "\n".join(map(printable, record.getMessage().split("\n")))
        return super().format(record)

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802, of logging
        record.message = printable(record.message)
        return super().formatMessage(record)


def stage_main(verb: str) -> None:
    """Run a verb with the arguments of the command line.

    The exit code is 0 for success, 1 for an error, 2 for bad options, 130 for Ctrl-C, 143 for SIGTERM.

    Args:
        verb: Name of the verb.
    """
    arguments = sys.argv[1:]
    open_closed_streams()
    prepare_threads()
    report_nothing()
    keep_freed_memory()
    handler = TerminalHandler()
    handler.setFormatter(_OneLineFormatter("%(asctime)s %(name)s: %(message)s", "%H:%M:%S"))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    with catch_signals() as signals:
        try:
            with signals.raising():
                code, message = attempt(f"permafrost {verb}", lambda: _run_typed(verb, arguments))
        except BaseException as error:
            # A signal may end in any exception, as where it cuts an import.
            # Ray turns an exception raised inside its calls into a KeyboardInterrupt.
            if not signals.received and not isinstance(error, KeyboardInterrupt):
                raise
            code, message = signals.exit_code, signals.describe(verb)
    if message:
        print(message, file=sys.stderr)
    if code:
        sys.exit(code)


def attempt(program: str, run: Callable[[], None]) -> tuple[int, str]:
    """Run a part of a program, and return its exit code and the line of an error that the user can fix."""
    try:
        run()
    except ConfigError as error:
        code, reason = 2, _text_of(error)
    except UserError as error:
        code, reason = 1, _text_of(error)
    except (RuntimeError, MemoryError) as error:
        if (described := device_error(error)) is None:
            raise
        code, reason = 1, _text_of(described)
    except SystemExit as error:  # its status may be that of a success
        code, reason = (
            1,
            printable(
                f"the code of a network, a plug-in or a library ended the program (SystemExit: {error})"
            ),
        )
    except BrokenPipeError:  # as in `permafrost distill --cfg job | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE, ""
    except OSError as error:  # an error of a disk, a network mount or a file name
        place = f"{error.filename}: " if error.filename and error.strerror else ""
        code, reason = 1, printable(with_remedy(f"{place}{error.strerror or error}", error))
    else:
        return 0, ""
    return code, f"{program}: error: {reason}"


def _run_typed(verb: str, arguments: Sequence[str]) -> None:
    """Show the help or the config if the arguments ask for it, otherwise run the verb and print its result."""
    load_plugins(plugin_names(arguments))
    if {"-h", "--help"} & set(arguments):
        asked = [
            argument
            for argument in arguments
            if section_of(argument) in (*section_names(verb), "experiment")
        ]
        print(_help(verb, asked, is_full=bool(asked) or "all" in arguments))
        return
    if "--cfg" in arguments:
        print(dump_yaml(sections_of_verb(verb, compose(verb, _without_cfg(arguments)))), end="")
        return
    if "--plan" in arguments:
        for name, value in describe_plan(verb, [w for w in arguments if w != "--plan"]).items():
            print(f"{name}: {printable(value)}")
        return
    ranks = os.environ.get("WORLD_SIZE", "1")
    require(
        "RANK" not in os.environ or ranks == "1",
        f"torchrun started {ranks} copies of this command; run it without torchrun and set trainer.ranks={ranks}, or "
        "write a loop of your own (docs/howto/own-loop.md)",
    )
    started = time.monotonic()
    result = run_typed_command(verb, arguments)
    check_interrupted()
    _print_result(result, time.monotonic() - started, arguments)


def _without_cfg(arguments: Sequence[str]) -> list[str]:
    """Return the arguments besides --cfg job, which may be anywhere on the line."""
    place = arguments.index("--cfg")
    require(
        arguments[place + 1 : place + 2] == ["job"],
        "--cfg prints the options of the job; write --cfg job",
    )
    return [*arguments[:place], *arguments[place + 2 :]]


Objects = Mapping[str, Mapping[str, Any]]
"""Values that no argument can name, such as a network in memory, by section and field."""


def run_typed_command(verb: str, arguments: Sequence[str], objects: Objects | None = None) -> Any:
    """Run a verb with the arguments of a command line, and return its result.

    Args:
        verb: Name of the verb.
        arguments: Arguments of the command line.
        objects: Objects of the program that calls it; None for a command.

    Raises:
        ConfigError: If the arguments do not fit the verb or its options.
        UserError: Any other error that the user can fix, of the verb.
    """
    load_plugins(plugin_names(arguments))
    described = VERBS[verb]
    with ExitStack() as stack:
        stack.enter_context(_named_packages(verb))
        function = described.load()
        config, composed = _configure(verb, arguments, stack, objects or {})
        stack.enter_context(ordinary_torch())
        if composed["run"]:
            stack.enter_context(without_remains(composed["run"]))
        if described.locks_run:
            is_array = composed["executor"] == "array"
            stack.enter_context(
                folder_lock(RunFolder(composed["run"]).path, "run", is_shared=is_array)
            )
        _import_pandas()
        result = function(config, arguments) if described.swept else function(config)
        if described.saves_options and composed["run"]:
            path = RunFolder(composed["run"]).path / f"{verb}.yaml"
            save_options(path, sections_of_verb(verb, composed), composed["command"])
        return result


_PACKAGES = {
    **{name: name for name in ("matplotlib", "jinja2", "networkx", "timm", "transformers")},
    "sklearn": "scikit-learn",
}
"""Packages of the extras report, papers, timm, transformers and demo, by the name of their module."""


@contextmanager
def _named_packages(verb: str) -> Iterator[None]:
    """Say how to install a package of an extra that a verb imports in the block, where it is missing."""
    try:
        yield
    except ModuleNotFoundError as error:
        if (package := _PACKAGES.get((error.name or "").partition(".")[0])) is None:
            raise
        raise ConfigError(
            f"{verb} needs the package {package} for this; install it with: pip install {package}"
        ) from error


def describe_plan(verb: str, arguments: Sequence[str]) -> dict[str, str]:
    """Return what a command would read, compute and write, by name.

    Args:
        verb: Name of the verb.
        arguments: Arguments of the command line.

    Raises:
        ConfigError: If the arguments do not fit the verb or its options, or the verb has no plan.
        UserError: Any other error that the user can fix, of the verb.
    """
    load_plugins(plugin_names(arguments))
    require(VERBS[verb].plan != "", f"{verb} has no plan to print; leave out --plan")
    with ExitStack() as stack:
        stack.enter_context(_named_packages(verb))
        config, _ = _configure(verb, arguments, stack)
        stack.enter_context(ordinary_torch())
        options = (config, arguments) if VERBS[verb].swept else (config,)
        with closing(resolve_name(VERBS[verb].plan)(*options)) as plan:
            described: dict[str, str] = plan.describe_work()
        if verb == "precompute" and config.executor == "array" and "estimate" in VERBS:
            described["tasks"] = _tasks_that_pay(arguments, plan.missing_records)
        return described


def _tasks_that_pay(arguments: Sequence[str], missing: int | None) -> str:
    """Estimate how many tasks of a job array pay for this many records, or all if the number is None."""
    if missing == 0:
        return "none, as nothing is missing"
    sample = ["run=", "estimate.rounds=1", "estimate.seconds=30"]
    sample += [f"estimate.records={missing}"] * (missing is not None)
    try:
        return str(run_typed_command("estimate", [*arguments, *sample]).lines["tasks"])
    except UserError as error:
        return f"not estimated: {error}"


def _configure(
    verb: str,
    arguments: Sequence[str],
    stack: ExitStack,
    objects: Objects = MappingProxyType({}),
) -> tuple[Any, dict[str, Any]]:
    """Return the options of a command, and all sections as plain values; mirror its run until the stack is closed."""
    complete = complete_arguments(verb, arguments)
    composed = compose(verb, complete) | {"command": [verb, *arguments]}
    run, store = composed["run"], composed["store"]
    if run:
        require_name("run", run, may_have_folders=True)
    stack.enter_context(mirrored_run(run))
    if VERBS[verb].takes_store_of_run and run and not store["path"]:
        from permafrost.runs.store_of_run import store_of_run  # imports pyarrow

        composed["store"] = store | {"path": store_of_run(run, store)}
        logger.info("store.path=%s, from which run=%s was trained", composed["store"]["path"], run)
    packing = "" if verb == "teach" else ", or teacher=none for a store without a pass"
    require(
        not VERBS[verb].needs_teacher or names_teacher(verb, complete),
        f"{verb} needs a teacher; name it, as in teacher=torchvision teacher.name=resnet50{packing}",
    )
    config = place_paths(build_verb_config(verb, composed))
    for section, values in objects.items():
        config = replace(config, **{section: replace(getattr(config, section), **values)})
    if (check_arguments := VERBS[verb].check_arguments) is not None:
        check_arguments(complete, composed, config)
    return config, composed


def _import_pandas() -> None:
    """Import what pyarrow imports at its first conversion, where it swallows every exception, also that of a signal."""
    with keep_signals():
        import pyarrow as pa

        pa.array([0])


def _help(verb: str, arguments: Sequence[str] = (), *, is_full: bool = False) -> str:
    """Return the help of a verb, with its common options unless it is full.

    In a full one, `arguments` choose members of groups, whose options are then shown.
    """
    from permafrost.config.help_text import describe_common, describe_verb

    describe = describe_verb if is_full else describe_common
    return (
        f"{VERBS[verb].help}\n\n{describe(verb, compose(verb, arguments))}\n\n"
        "--help all lists every option, and --help method=kd those of another member of a group.\n"
        "--cfg job [key=value ...] prints the resolved config and does nothing.\n"
        "--plan [key=value ...] prints what would be read, computed and written, and does nothing."
    )


def _print_result(result: Any, seconds: float | None = None, arguments: Sequence[str] = ()) -> None:
    """Print a line per value of the result, then the time, if it was measured, and the next command.

    `arguments` are those of this command; the next one is of the same experiment.
    """
    if not is_dataclass(result) or isinstance(result, type):
        return
    shown = {spec.name: getattr(result, spec.name) for spec in fields(result) if spec.repr}
    values = result.printed() if hasattr(result, "printed") else shown
    after = next_command(values.pop("next", ""), arguments)
    values["seconds"] = "" if seconds is None else f"{seconds:.1f}"
    for name, value in {**values, "next": after}.items():
        if value not in ("", {}):
            text = _printable(value)
            print(f"{name}:{text}" if text.startswith("\n") else f"{name}: {text}")


def next_command(command: str, arguments: Sequence[str]) -> str:
    """Return the next command, with the experiment of this one if there is one, and the modules that it has loaded.

    Args:
        command: Next command as a verb suggests it.
        arguments: Arguments of this command.
    """
    if not command.startswith("permafrost "):
        return command  # of another program
    program, verb, *more = shlex.split(command)
    location_arguments = [
        argument for argument in arguments if argument.startswith(VERBS[verb].typed_arguments)
    ]
    if " experiment=" in command:  # it is whole, except for the run and the store
        return shlex.join(dict.fromkeys([program, verb, *more, *location_arguments]))
    experiment = [argument for argument in arguments if argument.startswith("experiment=")]
    typed = plugin_names([word for word in arguments if word not in experiment])
    pairs = [word.partition("=")[::2] for word in arguments]
    factories = [value.rpartition(":")[0] for name, value in pairs if name.endswith(".factory")]
    plugins = list(dict.fromkeys([*typed, *factories]))
    if plugins and not any(word.startswith("plugins=") for word in more):
        more.append(f"plugins=[{','.join(plugins)}]")
    if not experiment:
        return shlex.join([program, verb, *more]) if plugins else command
    # The command has found out which pass was made, or which network was trained.
    prefixes = [*VERBS[verb].suggested_arguments, "plugins="]
    if any(argument.startswith("annotate.") for argument in arguments):
        prefixes.append("method")  # the experiment's may read what this pass does not have
    return shlex.join(
        [
            program,
            verb,
            *experiment,
            *location_arguments,
            *(argument for argument in more if argument.startswith(tuple(prefixes))),
        ]
    )


def _printable(value: Any) -> str:
    """Return a value of a result without control characters. One that begins with a line feed is a block of lines."""
    if isinstance(value, dict):
        return ", ".join(
            f"{printable(str(name))} {_printable(part)}" for name, part in value.items()
        )
    if isinstance(value, float):
        return f"{value:.4f}"
    text = f"{value:,}" if isinstance(value, int) else str(value)
    return "\n".join(map(printable, text.split("\n"))) if text[:1] == "\n" else printable(text)


def _text_of(error: UserError) -> str:
    """Return the lines of an error without control characters, and paths below the current folder relative to it."""
    below = re.compile(rf"(?<![\w.-]){re.escape(str(Path.cwd()))}/")
    return "\n".join(below.sub("", printable(line)) for line in error.lines or [str(error)])

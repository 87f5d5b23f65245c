"""From `key=value` words to a checked config, and from an error to one clear line.

Hydra composes the YAML of conf/ and nothing more; pipeline/config/ builds and checks the dataclasses. An
override may name only sections that the verb reads; an experiment may set any of them.
"""

from __future__ import annotations

import difflib
import json
import logging
import signal
import sys
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from pipeline.cluster.session import in_submitted_job
from pipeline.config import VERBS, ConfigError, ExistingClusterConfig, KubeRayClusterConfig
from pipeline.config.builder import build_verb_config
from pipeline.config.judging import ASK_TEACHER
from pipeline.config.paths import require_shared_paths, with_absolute_paths
from pipeline.errors import UserError
from pipeline.runs import RUNS, plain, save_config, to_yaml

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

C = TypeVar("C")

CONF = Path(__file__).resolve().parent.parent / "conf"
_SWEPT_VERBS = ("distill", "evaluate")


class Terminated(KeyboardInterrupt):
    """SIGTERM, as schedulers send it: ends a run as Ctrl-C does."""


def main(
    verb: str,
    run: Callable[[Any], Any],
    doc: str | None,
    configure: Callable[[Sequence[str]], Any] | None = None,
) -> None:
    """Run a stage from the command line.

    configure  makes the config of a stage whose words are not all its own
    Exit code 0; 1 for an error, 2 for bad options, 130 for Ctrl-C, 143 for SIGTERM.
    """
    words = sys.argv[1:]
    received: list[int] = []

    def terminate(number: int, frame: object) -> None:
        received.append(
            number
        )  # inside a call of Ray's, what is raised becomes a KeyboardInterrupt
        raise Terminated

    signal.signal(signal.SIGTERM, terminate)
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(name)s: %(message)s", datefmt="%H:%M:%S"
    )
    try:
        if {"-h", "--help"} & set(words):
            print(_help(verb, doc or ""))
            return
        if words[:1] == ["--cfg"]:
            shown = words[2:]
            values = plain(configure(shown)) if configure else sections(verb, compose(verb, shown))
            print(to_yaml(values), end="")
            return
        if configure is not None:
            _print_result(run(configure(words)))
            return
        composed = compose(verb, words)
        _check_live_words(verb, words, composed)
        config = place_paths(build_verb_config(verb, composed))
        _check_asked_words(verb, words, composed, config)
        if "run" in composed and verb in ("precompute", "sweep", "report"):
            save_config(RUNS / composed["run"] / f"{verb}.yaml", sections(verb, composed))
        _print_result(run(config))
    except ConfigError as error:
        sys.exit(_complain(verb, error, 2))
    except UserError as error:
        sys.exit(_complain(verb, error, 1))
    except OSError as error:  # a disk, a network mount or a name that the system refuses
        place = f"{error.filename}: " if error.filename and error.strerror else ""
        sys.exit(_complain(verb, f"{place}{error.strerror or error}", 1))
    except KeyboardInterrupt:
        how, code = ("terminated", 143) if received else ("interrupted", 130)
        print(
            f"permafrost {verb}: {how}; the same command goes on where it stopped", file=sys.stderr
        )
        sys.exit(code)


def compose(verb: str, overrides: Sequence[str]) -> dict[str, Any]:
    """All sections as plain values: defaults, then the experiment, then `overrides`."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    for word in overrides:
        _check_word(verb, word)
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(version_base=None, config_dir=str(CONF)):
            composed = hydra_compose("config", overrides=_replacing_mappings(overrides))
        values = OmegaConf.to_container(composed, resolve=True)
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(_explain(overrides, error)) from error
    assert isinstance(values, dict)
    return {str(key): value for key, value in values.items()}


def place_paths(config: C) -> C:
    """A verb's config whose paths mean the same wherever its work is done.

    Raises ConfigError for a relative path in a job, whose driver's folder is a temporary copy.
    """
    cluster = getattr(config, "cluster", None)
    if in_submitted_job() or isinstance(cluster, KubeRayClusterConfig):
        require_shared_paths(config, getattr(cluster, "mount_path", None))
    return with_absolute_paths(config) if isinstance(cluster, ExistingClusterConfig) else config


def sections(verb: str, composed: dict[str, Any]) -> dict[str, Any]:
    """The part of a composed config that the verb reads."""
    return {name: value for name, value in composed.items() if name in _section_names(verb)}


def _section_names(verb: str) -> list[str]:
    verbs = (verb, *_SWEPT_VERBS) if verb == "sweep" else (verb,)
    return list(dict.fromkeys(spec.name for name in verbs for spec in fields(VERBS[name])))


def _replacing_mappings(overrides: Sequence[str]) -> list[str]:
    """`arms={...}` replaces an experiment's arms, `grid` alike; Hydra itself would merge the two."""
    words = []
    for word in overrides:
        name = word.partition("=")[0]
        words += [f"{name}=null", word] if name in ("arms", "grid") else [word]
    return words


def section_of(word: str) -> str:
    """The section that an override changes."""
    key = word.lstrip("+~").split("=", 1)[0]
    return key.split("@")[-1].split(".")[0].split("/")[0]


def _check_word(verb: str, word: str) -> None:
    if "=" not in word and not word.startswith("~"):
        raise ConfigError(f"cannot read {word!r}; options are written key=value, see --help")
    section = section_of(word)
    names = [*_section_names(verb), "experiment"]
    if section not in names:
        raise ConfigError(
            f"{verb} takes no {section}={_suggest(section, names)}; it takes: {', '.join(names)}"
        )


def _check_live_words(verb: str, words: Sequence[str], composed: dict[str, Any]) -> None:
    """An experiment may describe the teacher for all verbs; typed where nobody reads it, it is a mistake."""
    if verb != "distill" or composed["mode"] == "live":
        return
    for word in words:
        if section_of(word) in ("teacher", "explainer"):
            raise ConfigError(
                f"distill reads {word} with mode=live only; frozen targets come from the store: "
                "choose the pass with store.teacher="
            )


def _check_asked_words(
    verb: str, words: Sequence[str], composed: dict[str, Any], config: Any
) -> None:
    """The same for the teacher network of an evaluation, which few judges ask."""
    if verb != "evaluate" or config.teacher.kind == composed["teacher"]["kind"]:
        return
    for word in words:
        if section_of(word) == "teacher":
            raise ConfigError(
                f"evaluate reads {word} with subject=teacher and for the judges {', '.join(sorted(ASK_TEACHER))} only; "
                "the teacher's stored answers are chosen by store.teacher="
            )


def _explain(overrides: Sequence[str], error: Exception) -> str:
    """Hydra's complaint in terms of what was typed and what is allowed."""
    from hydra.errors import OverrideParseException

    for word in overrides:
        key, _, value = word.lstrip("+~").partition("=")
        group = CONF / key.split("@")[0]
        if group.is_dir():
            options = sorted(
                path.relative_to(group).with_suffix("").as_posix() for path in group.rglob("*.yaml")
            )
            if value not in options:
                hint = _suggest(value, options)
                return f"{key}={value} does not exist{hint}; choose one of: {', '.join(options)}"
        elif f"Could not override '{key}'" in str(error):
            known = _known_keys(key, overrides)
            return f"unknown option {key}{_suggest(key.split('.')[-1], known)}; known there: {', '.join(known)}"
    if isinstance(error, OverrideParseException):
        return f"cannot read {error.override!r}: {error.message.split(chr(10))[0]}; quote lists and braces"
    return " ".join(str(error).split())


def _known_keys(key: str, overrides: Sequence[str]) -> list[str]:
    """The options beside `key`, in the config that the other words make."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir

    groups = [w for w in overrides if (CONF / w.split("=")[0].split("@")[0]).is_dir()]
    with initialize_config_dir(version_base=None, config_dir=str(CONF)):
        node: Any = hydra_compose("config", overrides=groups)
    for part in key.split(".")[:-1]:
        child = node.get(part) if hasattr(node, "get") else None
        if child is None:
            break
        node = child
    return sorted(str(name) for name in node) if hasattr(node, "keys") else []


def _suggest(word: str, allowed: Sequence[str]) -> str:
    close = difflib.get_close_matches(word, allowed, n=1)
    return f" (did you mean {close[0]}?)" if close else ""


def _help(verb: str, doc: str) -> str:
    groups = {
        path.name: sorted(
            option.relative_to(path).with_suffix("").as_posix() for option in path.rglob("*.yaml")
        )
        for path in sorted(CONF.iterdir())
        if path.is_dir() and path.name in [*_section_names(verb), "experiment"]
    }
    choices = "\n".join(f"  {name}={' | '.join(options)}" for name, options in groups.items())
    defaults = to_yaml(sections(verb, compose(verb, [])))
    return (
        f"{doc.strip()}\n\nGroups:\n{choices}\n\nOptions and their defaults (section.option=value):\n\n{defaults}"
        "\n--cfg job [key=value ...] prints the resolved config and does nothing."
    )


def _print_result(result: Any) -> None:
    if is_dataclass(result) and not isinstance(result, type):
        for name, value in asdict(result).items():
            if value not in ("", {}):
                print(f"{name}: {json.dumps(value) if isinstance(value, dict) else value}")


def _complain(verb: str, error: Exception | str, code: int) -> int:
    print(f"permafrost {verb}: error: {error}", file=sys.stderr)
    return code

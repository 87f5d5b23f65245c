"""Write the KubeRay manifest of a job that runs another stage.

    permafrost render verb=precompute cluster=kuberay cluster.image=registry/permafrost:1 \\
        cluster.volume_claim=shared store.path=/mnt/permafrost/stores/demo run=/mnt/permafrost/runs/demo teacher=none
    permafrost render verb=verify cluster=kuberay cluster.image=registry/permafrost:1 \\
        cluster.volume_claim=shared store.path=/mnt/permafrost/stores/demo output=verify.yaml

Reads   only the options of the cluster and of the stage, and checks both
Writes  a RayJob for kubectl create -f, to the terminal or to the file `output=`
Rerun   the same command writes the same manifest
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path

from permafrost.cli import stage_main
from permafrost.config.compose import compose
from permafrost.config.paths import require_shared_paths
from permafrost.config.sections import section_of, sections_of_verb
from permafrost.config.verbs import VERBS, RenderConfig, build_verb_config
from permafrost.core.errors import require
from permafrost.storage.files import write_atomically

_OWN_SECTIONS = ("verb", "output")


@dataclass(frozen=True, kw_only=True)
class RenderResult:
    """Path of the written file, or an empty string."""

    manifest: str


def run(config: RenderConfig) -> RenderResult:
    """Print the manifest, or write it to a file."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("permafrost", "cluster"),
        autoescape=False,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["json"] = partial(json.dumps, ensure_ascii=False)
    text = environment.get_template("rayjob.yaml.j2").render(
        cluster=config.cluster,
        entrypoint=shlex.join(["python", "-m", f"stages.{config.verb}", *config.words]),
        works_in_driver=config.verb == "estimate" or not _reads_cluster(config.verb),
        installed_ray=version("ray"),
    )
    if config.output is None:
        print(text)
        return RenderResult(manifest="")
    write_atomically(Path(config.output), f"{text}\n".encode())
    return RenderResult(manifest=config.output)


def configure(words: Sequence[str]) -> RenderConfig:
    """Build the config from command-line words.

    Args:
        words: Words of the manifest, and of the verb that the job runs.

    Raises:
        ConfigError: If an option is wrong, also one that the job's stage rejects.
    """
    verbs = [verb for verb in VERBS if verb != "render"]
    for word in words:
        name, _, value = word.partition("=")
        require(
            name != "verb" or value in verbs,
            f"verb={value} does not exist; choose one of: {', '.join(verbs)}",
        )
    if not any(word.startswith("cluster=") for word in words):
        words = ["cluster=kuberay", *words]  # the only one that a manifest can describe
    shared = [word for word in words if section_of(word) in ("cluster", "experiment")]
    render_words = [word for word in words if section_of(word) in _OWN_SECTIONS]
    values = sections_of_verb("render", compose("render", [*render_words, *shared]))
    config: RenderConfig = build_verb_config("render", values)
    theirs = [
        word
        for word in words
        if section_of(word) not in _OWN_SECTIONS
        and (section_of(word) != "cluster" or _reads_cluster(config.verb))
    ]
    theirs_built = build_verb_config(config.verb, compose(config.verb, theirs))
    require_shared_paths(theirs_built, config.cluster.shared_folder)
    return replace(config, words=tuple(theirs))


def _reads_cluster(verb: str) -> bool:
    return "cluster" in {spec.name for spec in fields(VERBS[verb])}


if __name__ == "__main__":
    stage_main("render", run, __doc__, configure)

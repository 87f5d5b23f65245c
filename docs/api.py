"""Write docs/reference/api.md, the page of the public names, from their docstrings.

python -m docs.api > docs/reference/api.md
"""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from importlib import import_module
from typing import TYPE_CHECKING, Any

import permafrost
from permafrost.config.verbs import VERBS

if TYPE_CHECKING:
    from collections.abc import Iterator

RETURNED = (
    "permafrost.loading.selected_records:SelectedRecords",
    "permafrost.loading.record_loader:ViewBatch",
    "permafrost.core.batches:Batch",
    "permafrost.core.batches:StoredTargets",
    "permafrost.core.batches:Targets",
    "permafrost.core.batches:TopLogits",
    "permafrost.store.reader:Store",
    "permafrost.store.reader:TeacherPass",
    "permafrost.loading.dataset:StoreDataset",
)
"""Classes of what the functions of the package return."""
METHODS = ("permafrost_report.store_sheet:show_records",)
"""Functions that packages add to an opened store as methods."""
DOORS = (
    "permafrost.losses.base:DistillationLoss",
    "permafrost.losses.base:LossCallbacks",
    "permafrost.losses.base:Needs",
    "permafrost.losses.base:StudentOutput",
    "permafrost.losses.base:Term",
    "permafrost.losses.base:TeacherBatches",
    "permafrost.losses.kd:KDLoss",
    "permafrost.losses.labels:LabelsLoss",
    "permafrost.models.classifier:Classifier",
    "permafrost.models.classifier:ModelOutput",
    "permafrost.models.classifier:GapLinear",
    "permafrost.models.classifier:Normalize",
    "permafrost.models.classifier:Provider",
    "permafrost.models.classifier:PretrainedInfo",
    "permafrost.annotation.outputs:OutputKind",
    "permafrost.annotation.outputs:EncodedFields",
    "permafrost.core.records:FieldSpec",
    "permafrost.core.records:Record",
    "permafrost.core.records:Content",
    "permafrost.config.store:OutputInfo",
    "permafrost.config.data:DataConfig",
    "permafrost.config.models:ModelConfig",
    "permafrost.config.methods:MethodConfig",
    "permafrost.config.methods:SoftTargetsConfig",
    "permafrost.config.methods:KDConfig",
    "permafrost.config.evaluation:EvaluatorOptions",
    "permafrost.config.augment:ViewsConfig",
    "permafrost.loading.windows:Views",
    "permafrost.config.options:Options",
    "permafrost.config.store:StoreOptions",
    "permafrost.config.verbs:Verb",
    "permafrost.core.tasks:ShardResult",
    "permafrost.core.tasks:Subject",
    "permafrost.cluster.executors:ExecutorChoice",
    "permafrost.storage.rooted_paths:RootedPath",
    "permafrost.config.explainers:ExplainerConfig",
    "permafrost.config.teaching:LabelTeachingConfig",
    "permafrost.evaluation.evaluator:Evaluator",
    "permafrost.evaluation.evaluator:Page",
    "permafrost.evaluation.evaluator:Quantity",
    "permafrost.evaluation.context:EvaluationContext",
    "permafrost.store.artifacts:Artifact",
    "permafrost.store.manifest:PassManifest",
    "permafrost.store.record_form:RecordForm",
    "permafrost_report.page:StoreSection",
    "permafrost_report.page:SectionPart",
)
"""Classes that plug-ins and packages derive from, fill or call."""
_SECTION = re.compile(r"^(Args|Returns|Yields|Raises|Example|Attributes):$", re.MULTILINE)
_ENTRY = re.compile(
    r"^(\*{0,2}\w[\w., ]*): (.*?)(?=^\*{0,2}\w[\w., ]*: |\Z)", re.MULTILINE | re.DOTALL
)


def section(text: str, name: str) -> Iterator[str]:
    """Yield the Markdown of one section of a docstring."""
    body = textwrap.dedent(text).strip("\n")
    if name == "Example":
        yield f"```text\n{body}\n```"
    elif name in ("Args", "Raises", "Attributes"):
        yield f"{name}:\n\n" + "\n".join(
            f"- `{entry}`: {' '.join(words.split())}" for entry, words in _ENTRY.findall(body)
        )
    else:
        yield f"{name}: {' '.join(body.split())}"


def described(docstring: str) -> str:
    """Return a docstring in Google style as Markdown."""
    text, _, doctest = docstring.partition("\n>>> ")
    first, *parts = _SECTION.split(text)
    blocks = [first.strip()]
    for name, body in zip(parts[::2], parts[1::2], strict=True):
        blocks += section(body, name)
    if doctest:
        blocks.append(f"```text\n>>> {doctest.strip()}\n```")
    return "\n\n".join(block for block in blocks if block)


class _Written:
    """Annotation that is shown as it is written."""

    def __init__(self, text: object) -> None:
        self.text = str(text)

    def __repr__(self) -> str:
        return self.text


def called(name: str, function: Any) -> str:
    """Return a block of code with the signature of a function, whose headings stay short."""
    return f"```text\n{name}{signature(function)}\n```\n\n"


def signature(function: Any) -> str:
    """Return the signature of a function as it is written."""
    empty = inspect.Parameter.empty
    whole = inspect.signature(function)
    shown = [
        p if p.annotation is empty else p.replace(annotation=_Written(p.annotation))
        for p in whole.parameters.values()
        if p.name != "self"
    ]
    returned = whole.return_annotation
    returned = returned if returned is empty else _Written(returned)
    return str(whole.replace(parameters=shown, return_annotation=returned))


def fields_of(cls: type[Any]) -> Iterator[tuple[str, str, str]]:
    """Yield name, type and docstring of the fields that a class declares."""
    (node,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    assert isinstance(node, ast.ClassDef)
    for field, after in zip(node.body, [*node.body[1:], None], strict=True):
        if not isinstance(field, ast.AnnAssign) or not isinstance(field.target, ast.Name):
            continue
        is_text = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
        text = " ".join(str(after.value.value).split()) if is_text else ""  # type: ignore[union-attr]
        if not field.target.id.startswith("_"):
            yield field.target.id, ast.unparse(field.annotation), text


def members_of(cls: type[Any]) -> Iterator[str]:
    """Yield the Markdown of the public methods and properties that a class defines."""
    for name, value in vars(cls).items():
        function = value.fget if isinstance(value, property) else inspect.unwrap(_plain(value))
        if name.startswith("_") or not inspect.isfunction(function) or not function.__doc__:
            continue
        shape = "" if isinstance(value, property) else called(name, function)
        yield f"#### `{cls.__name__}.{name}`\n\n{shape}{described(inspect.cleandoc(function.__doc__))}"


def _plain(value: Any) -> Any:
    function = getattr(value, "func", getattr(value, "__func__", value))
    return function if callable(function) else value


def page_of(value: Any, module: str) -> str:
    """Return the part of the page about a function or a class.

    Args:
        value: The function or class.
        module: Module from which users import it.
    """
    doc = described(inspect.getdoc(value) or "")
    if not inspect.isclass(value):
        imported = f"`from {module} import {value.__name__}`"
        return f"### `{value.__name__}`\n\n{imported}\n\n{called(value.__name__, value)}{doc}"
    blocks = [f"### `{value.__name__}`", f"`from {module} import {value.__name__}`", doc]
    init = vars(value).get("__init__")
    if init is not None and init.__doc__:
        blocks.append(called(value.__name__, init) + described(inspect.cleandoc(init.__doc__)))
    rows = [
        f"| `{n}` | `{hint}` | {text} |".replace(" | None", " \\| None")
        for n, hint, text in fields_of(value)
    ]
    if rows:
        blocks.append("\n".join(["| field | type | meaning |", "|---|---|---|", *rows]))
    return "\n\n".join([*blocks, *members_of(value)])


def names() -> Iterator[tuple[str, Any, str]]:
    """Yield the heading, the value and the module of all public names."""
    for name in permafrost.__all__:
        yield "Functions and classes of permafrost", getattr(permafrost, name), "permafrost"
    for verb in VERBS:
        if verb not in permafrost.__all__ and VERBS[verb].python:
            yield "Verbs and methods of packages", getattr(permafrost, verb), "permafrost"
    for heading, group in (
        ("Verbs and methods of packages", METHODS),
        ("What they return", RETURNED),
        ("For plug-ins and packages", DOORS),
    ):
        for place in group:
            module, _, name = place.partition(":")
            yield heading, getattr(import_module(module), name), module


def main() -> None:
    """Print the page."""
    parts = [
        "# Python interface",
        "Generated from the docstrings by `python -m docs.api`. Shapes are in brackets: B or n records, E target\n"
        "classes, A channels of a map, K classes. [Python](../howto/own-loop.md),\n"
        "[Plug-ins](../howto/plug-ins.md) and [A paper as a package](../howto/package.md) use these names;\n"
        "[Options](options.md) has those of the command line.",
    ]
    before = ""
    for heading, value, module in names():
        if heading != before:
            parts.append(f"## {heading}")
            before = heading
        parts.append(page_of(value, module))
    print("\n\n".join(parts))


if __name__ == "__main__":
    main()

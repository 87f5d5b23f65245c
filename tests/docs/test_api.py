"""The page of the Python interface: complete, and that of the docstrings."""

import ast
import inspect
import re
from importlib import import_module

import pytest

import permafrost
from docs import api
from docs.tables import doors
from tests.support.paths import ROOT

PAGE = ROOT / "docs/reference/api.md"
NAMES = {value.__name__ for _, value, _ in api.names()}
USERS = ("own-loop", "plug-ins", "package", "extend")


def test_the_page_is_that_of_the_docstrings(capsys):
    api.main()

    assert capsys.readouterr().out == PAGE.read_text()


def test_every_public_name_is_on_the_page():
    assert set(permafrost.__all__) <= NAMES


@pytest.mark.parametrize("page", USERS)
def test_what_the_code_of_a_page_imports_is_on_the_page(page):
    """Functions of losses, families and constants are not: pages name them where they are used."""
    text = (ROOT / f"docs/howto/{page}.md").read_text()
    code = "\n".join(re.findall(r"```python\n(.*?)```", text, re.DOTALL))
    imported = re.findall(r"^\s*from (permafrost[\w.]*) import (.*)$", code, re.MULTILINE)
    classes = {
        name
        for module, line in imported
        for name in line.split(", ")
        if inspect.isclass(getattr(import_module(module), name))
    }

    assert classes <= NAMES


def test_what_packages_import_from_the_core_says_what_it_is():
    """A name with arguments says what they are, as a stranger's package may call it."""
    unsaid = []
    for module, names in doors.imported_names().items():
        known = {}
        for name, text, node in doors.docstrings_of(module):
            if not any(
                "overload" in ast.unparse(each) for each in getattr(node, "decorator_list", ())
            ):
                known[name] = (text, node)
        for name in names:
            text, node = known[name]
            arguments = node.args.args + node.args.kwonlyargs if hasattr(node, "args") else []
            if not text or (len(arguments) > 2 and "Args:" not in text):
                unsaid.append(f"{module}:{name}")

    assert len(doors.imported_names()) > 100  # control
    assert unsaid == []


def test_a_docstring_becomes_lists_and_code():
    text = """Do a thing.

    It takes long.

    Args:
        one: [B], first.
            Goes on: here.
        two: Second.

    Returns:
        A tensor [B].

    Raises:
        ConfigError: If it does not fit.

    >>> 1 + 1
    2
    """

    assert api.described(api.inspect.cleandoc(text)) == (
        "Do a thing.\n\nIt takes long.\n\nArgs:\n\n- `one`: [B], first. Goes on: here.\n- `two`: Second.\n\n"
        "Returns: A tensor [B].\n\nRaises:\n\n- `ConfigError`: If it does not fit.\n\n```text\n>>> 1 + 1\n2\n```"
    )

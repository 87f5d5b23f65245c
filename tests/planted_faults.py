"""Faults planted in functions that two commits share, and whether the tests of each commit find them.

    python -m tests.planted_faults list <other checkout>      print the faults as JSON lines
    python -m tests.planted_faults run faults.jsonl           plant one after the other in this checkout; print rows

A fault changes one place: a comparison, a condition, a number (also an axis), an operator, or a check that is left out.
It is found if a test fails of the files that name its module, or of the tests of its package. The file is restored
after each. Run it in a separate checkout, as it edits the tree.
"""

from __future__ import annotations

import ast
import json
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from tests.support.paths import ROOT

CUT = (
    "losses",
    "models",
    "evaluation",
    "permafrost_report",
    "permafrost_exchange",
    "permafrost_papers",
)
"""Packages of half of the faults, whose tests became fewer."""
OTHERS = ("store", "loading", "training", "annotation", "config", "sources", "storage", "runs")
COUNT = 60
_OPERATORS = {
    **{ast.Lt: "<=", ast.LtE: "<", ast.Gt: ">=", ast.GtE: ">", ast.Eq: "!=", ast.NotEq: "=="},
    **{ast.In: "not in", ast.NotIn: "in", ast.Is: "is not", ast.IsNot: "is"},
    **{ast.Add: "-", ast.Sub: "+", ast.Mult: "/", ast.Div: "*", ast.And: "or", ast.Or: "and"},
}


def changes_of(node: ast.AST, source: str) -> Iterator[tuple[ast.AST, str]]:
    """Yield the nodes of a function that a fault may replace, each with the text of the fault."""
    if isinstance(node, ast.Compare) and len(node.ops) == 1 and type(node.ops[0]) in _OPERATORS:
        left, right = (ast.get_source_segment(source, n) for n in (node.left, node.comparators[0]))
        yield node, f"{left} {_OPERATORS[type(node.ops[0])]} {right}"
    elif isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        left, right = (ast.get_source_segment(source, n) for n in (node.left, node.right))
        if not isinstance(node.left, ast.Constant | ast.JoinedStr):
            yield node, f"{left} {_OPERATORS[type(node.op)]} {right}"
    elif isinstance(node, ast.BoolOp) and len(node.values) == 2:
        left, right = (ast.get_source_segment(source, n) for n in node.values)
        yield node, f"({left}) {_OPERATORS[type(node.op)]} ({right})"
    elif isinstance(node, ast.If | ast.IfExp):
        yield node.test, f"not ({ast.get_source_segment(source, node.test)})"
    elif isinstance(node, ast.Constant) and type(node.value) is int:
        yield node, str(node.value + 1)
    elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
        name = getattr(node.value.func, "id", "")
        yield from [(node, "pass")] if name in ("require", "require_entry") else []


def functions_of(path: Path) -> Iterator[tuple[str, ast.AST, str]]:
    """Yield the top functions and methods of a file with their text."""
    source = path.read_text()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef):
            yield node.name, node, ast.get_source_segment(source, node) or ""


def list_faults(other: Path) -> Iterator[dict[str, str]]:
    """Yield COUNT faults in functions that are the same in another checkout, half of them in the packages of CUT."""
    draws = random.Random(20261130)
    for packages in (CUT, OTHERS):
        candidates = []
        for path in sorted((ROOT / "pipeline").rglob("*.py")):
            name = path.relative_to(ROOT / "pipeline").parts
            package = name[1] if name[0] == "permafrost" else name[0]
            twin = other / path.relative_to(ROOT)
            if package not in packages or not twin.exists():
                continue
            same = {text for _, _, text in functions_of(twin)}
            for function, node, text in functions_of(path):
                if (
                    text in same
                    and twin.read_text().count(text) == path.read_text().count(text) == 1
                ):
                    candidates.append((path, function, node, text))
        drawn = 0
        for path, function, node, text in draws.sample(candidates, len(candidates)):
            source = path.read_text()
            places = [place for each in ast.walk(node) for place in changes_of(each, source)]
            if not places or drawn == COUNT // 2:
                continue
            target, fault = draws.choice(places)
            before = ast.get_source_segment(source, target) or ""
            start = len("\n".join(source.split("\n")[: target.lineno - 1]).encode()) + 1
            inside = source.encode()[: start + target.col_offset].decode()[source.index(text) :]
            drawn += 1
            yield {
                "file": str(path.relative_to(ROOT)),
                "function": function,
                "text": text,
                "planted": inside + fault + text[len(inside) + len(before) :],
                "fault": f"{before} -> {fault}"[:100].replace("\n", " "),
            }


def tests_of(file: str) -> list[list[str]]:
    """Return the tests to run after each other: files that name the module, then all of the package."""
    module = file.removeprefix("pipeline/").removesuffix(".py").replace("/", ".")
    parts = module.split(".")
    folder = ROOT / "tests" / (parts[1] if parts[0] != "permafrost_report" else "report")
    folder = ROOT / "tests/exchange" if parts[0] == "permafrost_exchange" else folder
    folder = ROOT / "tests/papers" if parts[0] == "permafrost_papers" else folder
    naming = [str(p) for p in sorted(ROOT.glob("tests/**/test_*.py")) if module in p.read_text()]
    return [naming[:8], [str(folder)] if folder.exists() else []]


def is_found(fault: dict[str, str]) -> str:
    """Plant a fault, run the tests, and return the test that failed, empty if none did."""
    path = ROOT / fault["file"]
    sound = path.read_text()
    assert sound.count(fault["text"]) == 1, fault["file"]
    path.write_text(sound.replace(fault["text"], fault["planted"]))
    command = (sys.executable, "-m", "pytest", "-q", "-x", "-n", "0", "-p", "no:cacheprovider")
    try:
        for tests in filter(None, tests_of(fault["file"])):
            done = subprocess.run(
                [*command, *tests], cwd=ROOT, capture_output=True, text=True, check=False
            )
            if done.returncode:
                lines = done.stdout.splitlines()
                return next((x[:110] for x in lines if x.startswith(("FAILED", "ERROR"))), "error")
    finally:
        path.write_text(sound)
    return ""


def main(verb: str, argument: str) -> None:
    """Run the command."""
    if verb == "list":
        for fault in list_faults(Path(argument)):
            print(json.dumps(fault))
        return
    for line in Path(argument).read_text().splitlines():
        fault = json.loads(line)
        found = is_found(fault) or "NOT FOUND"
        print(f"{fault['file']} {fault['function']}: {fault['fault']} | {found}", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])

"""Signatures of a package's classes and functions, read off its source without importing it."""

from __future__ import annotations

import ast
from pathlib import Path

# A parameter's kind, name and whether it has a default; values of defaults differ in spelling.
Signature = list[tuple[str, str, bool]]


def signatures(package: Path) -> dict[str, Signature]:
    """By name: a function's parameters, and `Class.__init__`'s and `Class.forward`'s; a dataclass's fields, too.

    Where several files define a name, the first in the order of their paths counts.
    """
    found: dict[str, Signature] = {}
    for file in sorted(package.rglob("*.py")):
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef):
                found.setdefault(node.name, _parameters(node.args))
            elif isinstance(node, ast.ClassDef):
                for name, signature in _of_class(node).items():
                    found.setdefault(f"{node.name}.{name}", signature)
    return found


def _of_class(node: ast.ClassDef) -> dict[str, Signature]:
    found = {
        inner.name: _parameters(inner.args)
        for inner in node.body
        if isinstance(inner, ast.FunctionDef) and inner.name in ("__init__", "forward", "set_context_parallel_group")
    }
    fields = [inner for inner in node.body if isinstance(inner, ast.AnnAssign) and isinstance(inner.target, ast.Name)]
    if fields and any("dataclass" in ast.unparse(decorator) for decorator in node.decorator_list):
        found["fields"] = [("field", inner.target.id, inner.value is not None) for inner in fields]  # type: ignore[union-attr]
    return found


def _parameters(arguments: ast.arguments) -> Signature:
    plain = [*arguments.posonlyargs, *arguments.args]
    without = len(plain) - len(arguments.defaults)
    result = [("plain", one.arg, number >= without) for number, one in enumerate(plain)]
    result += [("*", arguments.vararg.arg, False)] if arguments.vararg else []
    pairs = zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
    result += [("keyword", one.arg, default is not None) for one, default in pairs]
    return result + ([("**", arguments.kwarg.arg, False)] if arguments.kwarg else [])

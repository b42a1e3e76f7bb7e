"""The rules of the house (CONTRIBUTING.md), read off the source: each test lists every offence at once."""

from __future__ import annotations

import ast
import io
import re
import sys
import tokenize
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# Each room, and the rooms that it may import from besides itself.
ROOMS = {
    "examples": {"checkpoint_tools", "engine", "models", "data"},
    "checkpoint_tools": {"engine", "models", "data"},
    "engine": {"models", "data"},
    "models": set(),
    "data": set(),
}
OUTSIDE = {"tests", "benchmarks"}
ENTRY_ROOMS = ("examples", "checkpoint_tools")

FILE_LINES = {"tests": 400}  # others: 300
FUNCTION_LINES = 60

MODEL_NAMES = "llama qwen olmo gpt.?oss mistral mixtral gemma deepseek nemotron smollm granite glm phi.?[0-9]"
ROPE_KIND = re.compile(r"\bllama3\b")  # transformers' name for a way to scale rotary embeddings


def source_files(*rooms: str) -> Iterator[Path]:
    """Python files of these rooms, or of the whole house."""
    for room in rooms or (*ROOMS, *OUTSIDE):
        yield from sorted((ROOT / room).rglob("*.py"))


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@cache
def read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


@cache
def parse(path: Path) -> ast.Module:
    return ast.parse(read(path))


def imports(tree: ast.AST) -> Iterator[tuple[int, str, str]]:
    """(line, dotted module, name that it binds) of every absolute import, wherever it stands."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name, alias.asname or alias.name.split(".")[0]
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            for alias in node.names:
                yield node.lineno, node.module, alias.asname or alias.name


def wrong_imports(room: str, tree: ast.AST) -> list[tuple[int, str]]:
    closed = {*ROOMS, *OUTSIDE} - ROOMS[room] - {room}
    return [(line, module) for line, module, _ in imports(tree) if module.split(".")[0] in closed]


def dotted(node: ast.AST) -> str:
    """`a.b.c` of a chain of attributes, "" of anything else."""
    if isinstance(node, ast.Attribute):
        base = dotted(node.value)
        return f"{base}.{node.attr}" if base else ""
    return node.id if isinstance(node, ast.Name) else ""


def replacements(tree: ast.AST) -> list[tuple[int, str]]:
    """Where something of a foreign package is assigned to, deleted, or set by setattr; switches are not."""
    own = {*ROOMS, *OUTSIDE, *sys.stdlib_module_names}
    foreign = {bound for _, module, bound in imports(tree) if module.split(".")[0] not in own}
    found = []
    for node in ast.walk(tree):
        target: ast.expr
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store | ast.Del):
            target = node
        elif isinstance(node, ast.Call) and dotted(node.func) in ("setattr", "delattr") and node.args:
            target = node.args[0]
        else:
            continue
        name = dotted(target)
        if name.split(".")[0] in foreign and not name.startswith("torch.backends."):
            found.append((target.lineno, name))
    return found


def model_names(text: str) -> list[str]:
    families = [path.stem for path in (ROOT / "models" / "families").glob("*.py") if path.stem != "__init__"]
    pattern = "|".join([*MODEL_NAMES.split(), *map(re.escape, families)])
    return re.findall(pattern, ROPE_KIND.sub("", text), flags=re.IGNORECASE)


def is_main_guard(node: ast.stmt) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'"


def test_files_are_read_in_one_sitting():
    long = {name_of(path): len(read(path).splitlines()) for path in source_files()}
    long = {name: lines for name, lines in long.items() if lines > FILE_LINES.get(name.split("/")[0], 300)}
    assert long == {}, "a room is missing where a file outgrows its limit"


def test_functions_fit_on_a_screen():
    long = [
        f"{name_of(path)}:{node.lineno} {node.name}: {node.end_lineno - node.lineno + 1} lines"
        for path in source_files()
        for node in ast.walk(parse(path))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno - node.lineno >= FUNCTION_LINES
    ]
    assert long == []


def test_imports_point_one_way():
    wrong = [
        f"{name_of(path)}:{line} imports {module}"
        for room in ROOMS
        for path in source_files(room)
        for line, module in wrong_imports(room, parse(path))
    ]
    assert wrong == [], "examples -> checkpoint_tools -> engine -> models and data; nothing points back"


def test_only_the_mesh_touches_parallel_state():
    users = {
        name_of(path)
        for path in source_files(*ROOMS)
        for token in tokenize.generate_tokens(io.StringIO(read(path)).readline)
        if token.type == tokenize.NAME and token.string == "parallel_state"
    }
    assert users == {"engine/mesh.py"}


def test_only_the_host_replaces_foreign_code():
    found = {name_of(path): replacements(parse(path)) for path in source_files(*ROOMS)}
    assert found.pop("engine/host.py"), "the check must see what engine/host.py does"
    assert {name: places for name, places in found.items() if places} == {}


def test_model_names_stay_in_their_families():
    found = [
        f"{name_of(path)}:{number}: {line.strip()}"
        for room in ("engine", "models", "data", "checkpoint_tools")
        for path in source_files(room)
        if path.parent.name != "families"
        for number, line in enumerate([path.stem, *read(path).splitlines()])
        if model_names(line)
    ]
    assert found == [], "what depends on a model's name belongs in models/families/"


def test_entry_scripts_have_a_main_guard():
    # megatron-core's checkpoint writer starts processes that import the script: without a guard a save hangs.
    unguarded = []
    for path in source_files(*ENTRY_ROOMS):
        body = parse(path).body
        has_main = any(isinstance(node, ast.FunctionDef) and node.name == "main" for node in body)
        runs = [node for node in body if isinstance(node, ast.Expr) and not isinstance(node.value, ast.Constant)]
        if runs or (has_main and not any(map(is_main_guard, body))):
            unguarded.append(name_of(path))
    assert unguarded == []


def test_no_script_hides_a_module():
    # A script's folder comes first on sys.path, so its neighbours hide what bears the same name.
    taken = {*sys.stdlib_module_names, *ROOMS}
    neighbours = [path for room in ENTRY_ROOMS for path in (ROOT / room).iterdir()]
    neighbours += (ROOT / "examples" / "demo").glob("*.py")
    assert [name_of(path) for path in neighbours if path.stem in taken] == []


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import torch\ntorch.cuda.synchronize = print", [(2, "torch.cuda.synchronize")]),
        ("import torch.cuda as c\nc.Event = print", [(2, "c.Event")]),
        ("from torch import nn\ndef f():\n    setattr(nn.Linear, 'forward', f)", [(3, "nn.Linear")]),
        ("import torch\ndel torch.compile", [(2, "torch.compile")]),
        ("import torch\ntorch.backends.cuda.matmul.allow_tf32 = True", []),
        ("import torch\nimport sys\nsys.stdout = 1\nx = torch.zeros(1)\nx.mark = 2", []),
    ],
)
def test_replacements_are_seen(source: str, expected: list[tuple[int, str]]):
    assert replacements(ast.parse(source)) == expected


def test_model_names_are_seen():
    assert model_names('kind == "llama3"  # rope') == []
    assert model_names("class Llama3Model, llama, QWEN2, gpt-oss, gpt_oss, Phi3, Olmo2") == [
        "Llama", "llama", "QWEN", "gpt-oss", "gpt_oss", "Phi3", "Olmo",
    ]  # fmt: skip
    assert model_names("GPTModel, morphism, paragraphs") == []


def test_wrong_imports_are_seen():
    tree = ast.parse("import engine.step\ndef f():\n    from data.index import x\nimport torch")
    assert wrong_imports("models", tree) == [(1, "engine.step"), (3, "data.index")]
    assert wrong_imports("engine", tree) == []

"""Reads off the source what the files of the house import and replace, and holds imports against a table of walls."""

from __future__ import annotations

import ast
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import cache
from pathlib import Path
from typing import NamedTuple

# Each room, and the rooms that it may import from besides itself.
ROOMS = {
    "examples": {"checkpoint_tools", "engine", "models", "data"},
    "checkpoint_tools": {"engine", "models", "data"},
    "engine": {"models", "data"},
    "models": set(),
    "data": set(),
}
ONE_WAY = "examples -> checkpoint_tools -> engine -> models and data; nothing points back"
NO_CIRCLE = "no files import one another in a circle"
OUTSIDE = {"tests", "benchmarks"}


class Import(NamedTuple):
    """One name that an import brings in."""

    line: int
    module: str  # as it stands after `import` or `from`
    name: str  # the module, and what is taken from it
    bound: str  # the name that the file knows it by
    late: bool  # inside a function, so made at a call
    unmade: bool  # under `if TYPE_CHECKING:`, so never made at run time


@dataclass(frozen=True, kw_only=True)
class Wall:
    """What some files may not import, and the sentence that says why. Lists are words in one string."""

    files: str  # patterns of files, from the root
    closed: str = ""  # modules that they may not import, nor anything inside them
    but: str = ""  # what they may import of these all the same
    lazy: bool = False  # they may import anything inside a function
    deep: bool = False  # nor may files of ours that they import lead to a closed module
    order: str = ""  # in place of `closed`: a folder's files and folders/, each of which imports only those after it
    why: str

    def closes(self, taken: Import) -> bool:
        return inside(taken.name, self.closed) and not inside(taken.name, self.but)

    def place(self, file: str) -> int | None:
        """Where a file stands in `order`: None nowhere, past the end for the folder's __init__."""
        patterns = [*self.order.split(), "__init__"]
        inner = file.split("/", 1)[1]
        fits = (inner.startswith(p) if p.endswith("/") else inner == f"{p}.py" for p in patterns)
        return next((number for number, fit in enumerate(fits) if fit), None)


def inside(name: str, modules: str) -> bool:
    return any(f"{name}.".startswith(f"{module}.") for module in modules.split())


@cache
def parse(source: str) -> ast.Module:
    """The tree of a source, parsed once for all copies of the house that hold it."""
    return ast.parse(source)


def imports(tree: ast.AST, folder: str = "") -> Iterator[Import]:
    """Every import, wherever it stands, in the order of the lines; `folder` is what a relative one starts from."""
    return iter(sorted(_imports(tree, folder.split("/"), late=False, unmade=False)))


def _imports(node: ast.AST, folder: Sequence[str], *, late: bool, unmade: bool) -> Iterator[Import]:
    if isinstance(node, ast.Import):
        for alias in node.names:
            yield Import(node.lineno, alias.name, alias.name, alias.asname or alias.name.split(".")[0], late, unmade)
    elif isinstance(node, ast.ImportFrom):
        above = folder[: len(folder) + 1 - node.level] if node.level else ()
        module = ".".join([*above, *filter(None, [node.module])])
        for alias in node.names:
            yield Import(node.lineno, module, f"{module}.{alias.name}", alias.asname or alias.name, late, unmade)
    late = late or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    never: Sequence[ast.stmt] = ()
    if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
        never = node.body  # what stands under `else` is made
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.stmt | ast.excepthandler | ast.match_case):
            yield from _imports(child, folder, late=late, unmade=unmade or child in never)


@cache
def _made(source: str, folder: str) -> tuple[Import, ...]:
    return tuple(taken for taken in imports(parse(source), folder) if not taken.unmade)


class House:
    """The files of the five rooms under a root, and what each imports at run time."""

    def __init__(self, root: Path):
        paths = [path for room in ROOMS for path in sorted((root / room).rglob("*.py"))]
        self.sources = {path.relative_to(root).as_posix(): path.read_text(encoding="utf-8") for path in paths}
        self.imports = {name: _made(source, name.rpartition("/")[0]) for name, source in self.sources.items()}

    def file_of(self, name: str) -> str | None:
        """The file in which a dotted name is looked up; None if it is not ours."""
        parts = name.split(".")
        ways = ["/".join(parts[:length]) for length in range(len(parts), 0, -1)]
        candidates = (file for way in ways for file in (f"{way}.py", f"{way}/__init__.py"))
        return next((file for file in candidates if file in self.sources), None)

    def run_by(self, name: str) -> list[str]:
        """The files that importing a name runs: its own, and the __init__ of every folder above."""
        own = self.file_of(name) or ""
        above = [f"{folder}/__init__.py" for folder in Path(own).parents]
        return [file for file in [own, *above] if file in self.sources]


def wrong_imports(room: str, tree: ast.AST) -> list[tuple[int, str]]:
    """Line and module of what this room may not import, also where only a type checker reads it."""
    closed = {*ROOMS, *OUTSIDE} - ROOMS[room] - {room}
    return list(dict.fromkeys((i.line, i.module) for i in imports(tree) if i.module.split(".")[0] in closed))


def crossings(root: Path) -> list[str]:
    """Imports that lead up from a room to one above it, or out of the house."""
    return [
        f"{file}:{line} imports {module}: {ONE_WAY}"
        for file, source in House(root).sources.items()
        for line, module in wrong_imports(file.split("/")[0], parse(source))
    ]


def breaches(root: Path, walls: Sequence[Wall]) -> list[str]:
    """Every import that goes through a wall: file, line, what it imports and the wall's sentence."""
    house = House(root)
    return [
        f"{file}{what}: {wall.why}"
        for wall in walls
        for file in house.sources
        if any(fnmatch(file, pattern) for pattern in wall.files.split())
        for what in (_against_order if wall.order else _through)(house, wall, file)
    ]


def _through(house: House, wall: Wall, file: str) -> Iterator[str]:
    for taken in house.imports[file]:
        if taken.late and wall.lazy:
            continue
        if wall.closes(taken):
            yield f":{taken.line} imports {taken.name}"
        elif wall.deep and (way := _way(house, wall, taken.name)):
            yield f":{taken.line} imports {taken.name}, which leads to {way}"


def _way(house: House, wall: Wall, name: str) -> str:
    """How an import ends, as it is made, at a closed module: "MODULE (file:line, file:line)", or ""."""
    waiting = deque((file, "") for file in house.run_by(name))
    seen = set()
    while waiting:
        file, way = waiting.popleft()
        if file in seen:
            continue
        seen.add(file)
        for taken in house.imports[file]:
            here = f"{way}, {file}:{taken.line}".removeprefix(", ")
            if not taken.late and wall.closes(taken):
                return f"{taken.name} ({here})"
            if not taken.late:
                waiting.extend((following, here) for following in house.run_by(taken.name))
    return ""


def _against_order(house: House, wall: Wall, file: str) -> Iterator[str]:
    place = wall.place(file)
    if place is None:
        yield ":1 stands nowhere in its folder's list"
        return
    for taken in house.imports[file]:
        other = house.file_of(taken.name)
        if other and other.split("/")[0] == file.split("/")[0]:
            above = wall.place(other)
            if above is not None and above < place:
                yield f":{taken.line} imports {taken.name}"


def circles(root: Path) -> list[str]:
    """Files that import one another in a circle, each with the line of its import, in order."""
    house = House(root)
    found, seen = [], set()
    for start in house.sources:
        way = None if start in seen else _way_back(house, start)
        if way:
            seen |= {place.rpartition(":")[0] for place in way}
            found.append(f"{' -> '.join([*way, start])}: {NO_CIRCLE}")
    return found


def _way_back(house: House, start: str) -> list[str] | None:
    """The shortest way of imports from a file to itself."""
    waiting: deque[tuple[str, list[str]]] = deque([(start, [])])
    seen = set()
    while waiting:
        file, way = waiting.popleft()
        for taken in house.imports[file]:
            target = house.file_of(taken.name)
            here = [*way, f"{file}:{taken.line}"]
            if target == start:
                return here
            if target and target not in seen:
                seen.add(target)
                waiting.append((target, here))
    return None


def idle(root: Path, walls: Sequence[Wall]) -> list[str]:
    """What the table names and the house does not have: a wall around nothing would hold for ever."""
    house = House(root)
    inner = [f"{wall.files.split('/')[0]}/{word}" for wall in walls for word in wall.order.split()]
    named = [pattern for wall in walls for pattern in wall.files.split()]
    named += [f"{name}*" if name.endswith("/") else f"{name}.py" for name in inner]
    return [pattern for pattern in named if not any(fnmatch(file, pattern) for file in house.sources)]


def dotted(node: ast.AST) -> str:
    """`a.b.c` of a chain of attributes, "" of anything else."""
    if isinstance(node, ast.Attribute):
        base = dotted(node.value)
        return f"{base}.{node.attr}" if base else ""
    return node.id if isinstance(node, ast.Name) else ""


def replacements(tree: ast.AST) -> list[tuple[int, str]]:
    """Where something of a foreign package is assigned to, deleted, or set by setattr; switches are not."""
    own = {"", *ROOMS, *OUTSIDE, *sys.stdlib_module_names}  # "" is where a relative import begins
    foreign = {taken.bound for taken in imports(tree) if taken.module.split(".")[0] not in own}
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


def copy(root: Path, to: Path) -> None:
    """Writes the files of the five rooms under another root."""
    for file, source in House(root).sources.items():
        (to / file).parent.mkdir(parents=True, exist_ok=True)
        (to / file).write_text(source, encoding="utf-8")

"""How large the house is: Python files and lines of each folder and room, counted as `wc -l` does, and their sums."""

from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LIBRARY = ("engine", "models", "data", "checkpoint_tools")
ROOMS = (*LIBRARY, "examples", "tests", "benchmarks")

Size = tuple[int, int]  # files, lines


def count(root: Path) -> dict[str, Size]:
    """The size of every folder, without the folders in it; each room's come one after another."""
    sizes: dict[str, Size] = {}
    for path in (path for room in ROOMS for path in sorted((root / room).rglob("*.py"))):
        folder = path.parent.relative_to(root).as_posix()
        files, lines = sizes.get(folder, (0, 0))
        sizes[folder] = files + 1, lines + path.read_bytes().count(b"\n")
    return dict(sorted(sizes.items(), key=lambda item: (ROOMS.index(item[0].split("/")[0]), item[0])))


def total(sizes: dict[str, Size], rooms: Sequence[str]) -> Size:
    """The size of these rooms together."""
    parts = [size for folder, size in sizes.items() if folder.split("/")[0] in rooms]
    return sum(files for files, _ in parts), sum(lines for _, lines in parts)


def main() -> None:
    sizes = count(ROOT)
    rooms = {f"{room}/ in all": total(sizes, [room]) for room in ROOMS}
    rows = {**sizes, **rooms, " + ".join(LIBRARY): total(sizes, LIBRARY), "all folders": total(sizes, ROOMS)}
    width = max(map(len, rows))
    print(f"{'folder':<{width}} {'files':>6} {'lines':>7}")
    for name, (files, lines) in rows.items():
        print(f"{name:<{width}} {files:>6,} {lines:>7,}")


if __name__ == "__main__":
    main()

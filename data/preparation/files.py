"""Sources by their names: files, globs, directories and Hugging Face data sets -> the files of rows in them."""

import atexit
import functools
import glob
import hashlib
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

from data.preparation.rows import JsonLines, Table, file_identity, opened
from data.preparation.tables import open_csv, open_json

_TEXTS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv")
_BINARY = (".parquet", ".arrow", ".feather")
_COMPRESSED = {".gz": "gzip", ".zst": "zstd"}
_KNOWN = f"{', '.join(_TEXTS)} (each also as .gz or .zst), {', '.join(_BINARY)}"
_SAVED = ("dataset_dict.json", "state.json")  # what `save_to_disk` leaves
_LEFT_ALONE = re.compile(
    r"\..*|_[^.]*|.*\.md|(readme|licen[cs]e|notice|citation|changelog)(\.(txt|rst|cff|bib))?"
    r"|dataset_(infos?|dict)\.json|state\.json",
    re.IGNORECASE,
)


def open_source(
    name: str, config: str | None = None, split: str | None = None, scratch: Path | None = None
) -> list[JsonLines | Table]:
    """All files of a source in sorted order, each read by its own columns; a data set is one.

    A source is a file, a glob (`data/*.jsonl`, `data/**`), a directory with all that is in it, a directory that
    `save_to_disk` wrote, or a hub data set `name[:config[:split]]`. DIRECTORY:CONFIG:SPLIT is what `datasets` takes
    for that by its own rules.

    Every file of a directory or glob is read, whatever its name, and one that cannot be read is refused by its name,
    but for what its name says is no data (`left_alone` lists it): hidden files and directories, `_SUCCESS` and other
    names with `_` and no suffix, `.md`, README, LICENSE and the like, and what `datasets` writes beside data, such as
    `dataset_info.json`.

    scratch: where decompressed copies are kept and found again; without it they are removed at exit.
    Raises ValueError where there is no such source, or a file of it cannot be read.
    """
    try:
        path = Path(os.path.expanduser(name))
        if path.exists() and not path.is_dir():
            return [_open_file(name, path, scratch)]
        if path.is_dir() and not _is_saved(path) and (config or split):
            raise ValueError(
                f"{name}: every file of a directory is read, so --config and --split cannot choose: leave them out,"
                f" or write {name}:{config or ''}:{split or ''} for what the `datasets` library takes for that"
            )
        if (listed := _list(name)) is not None:
            return [_open_file(str(file), file, scratch) for file in listed[0]]
        return [_open_dataset(name, config, split)]
    except OSError as error:
        raise ValueError(f"{error.filename or name}: {error.strerror or error}") from error


def left_alone(name: str) -> list[str]:
    """The files and hidden directories in a source's directory or glob that `open_source` does not read."""
    listed = _list(name)
    return [] if listed is None else [str(path) for path in listed[1]]


def _list(name: str) -> tuple[list[Path], list[Path]] | None:
    """The files that are read and those left alone, where the name is a directory's or a glob."""
    path = Path(os.path.expanduser(name))
    if path.is_dir():
        if _is_saved(path):
            return None
        found = set(_walk(path))
        nothing = "the directory holds no file of rows"
    elif any(sign in name for sign in "*?[") and not path.exists():
        found = set()
        for match in map(Path, glob.glob(str(path), recursive=True)):
            found |= set(_walk(match)) if match.is_dir() else {match}
        nothing = "no file of rows matches"
    else:
        return None
    alone = sorted(file for file in found if _LEFT_ALONE.fullmatch(file.name))
    files = sorted(found.difference(alone))
    if strange := [file for file in files if _kind(file) is None]:
        raise ValueError(f"{name}: {_some(strange)} cannot be read, known are {_KNOWN}: move what is no data away")
    if not files:
        _refuse_commas(name)
        raise ValueError(f"{name}: {nothing}" + (f", only {_some(alone)}" if alone else ""))
    return files, alone


def _some(files: list[Path]) -> str:
    return ", ".join(map(str, files[:3])) + (f" and {len(files) - 3} more" if len(files) > 3 else "")


def _walk(folder: Path) -> Iterator[Path]:
    """All files below a directory and the hidden directories in it; links are followed, each directory once."""
    seen = set()
    for place, folders, names in os.walk(folder, followlinks=True, onerror=_raise):
        real = os.path.realpath(place)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        if _is_saved(Path(place)):
            raise ValueError(f"{place} was written by `save_to_disk`: give it as a source of its own")
        yield from (Path(place, name) for name in [*names, *(name for name in folders if name.startswith("."))])
        folders[:] = sorted(name for name in folders if not name.startswith("."))


def _raise(error: OSError) -> NoReturn:
    raise error


def _is_saved(folder: Path) -> bool:
    return any((folder / mark).is_file() for mark in _SAVED)


def _kind(path: Path) -> tuple[str, str] | None:
    """The suffix that says how a file is read, and what it is compressed with (or nothing); None for other files."""
    suffix = path.suffix.lower()
    inner = Path(path.stem).suffix.lower()
    if suffix in _COMPRESSED:
        return (inner, _COMPRESSED[suffix]) if inner in _TEXTS else None
    return (suffix, "") if suffix in _TEXTS or suffix in _BINARY else None


def _open_file(name: str, path: Path, scratch: Path | None) -> JsonLines | Table:
    if not stat.S_ISREG(path.stat().st_mode):
        raise ValueError(f"{name}: neither a file nor a directory; write what comes through a pipe to a file first")
    kind = _kind(path)
    if kind is None:
        raise ValueError(f"{name}: unknown kind of file, known are {_KNOWN}")
    suffix, compression = kind
    with opened(path) as file:
        if not file.read(1):
            raise ValueError(f"{name}: the file is empty")
    original = None
    if compression:
        original, path = path, _decompressed(name, path, suffix, compression, scratch or _temporary())
        if path.stat().st_size == 0:
            raise ValueError(f"{name}: the file is empty")
    if suffix == ".json":
        return open_json(name, path, original)
    if suffix in (".csv", ".tsv"):
        return open_csv(name, path, "," if suffix == ".csv" else "\t", original)
    if suffix in _TEXTS:
        return JsonLines(name, path, original)
    from data.preparation.arrow import open_arrow, open_parquet  # most sources do not need Arrow

    return open_parquet(name, path) if suffix == ".parquet" else open_arrow(name, path)


def _decompressed(name: str, path: Path, suffix: str, compression: str, scratch: Path) -> Path:
    """A copy that can be read from any byte on, named after the state of the file that it was made of."""
    copy = scratch / (hashlib.sha256(file_identity(path).encode()).hexdigest()[:32] + suffix)
    if copy.is_file():
        return copy
    scratch.mkdir(parents=True, exist_ok=True)
    partial = copy.with_name(f"{copy.name}.{os.getpid()}.partial")
    try:
        with open(partial, "wb") as file:
            for block in _blocks(name, path, compression):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())  # a copy that has its name is whole, even after the machine went down
        os.replace(partial, copy)
    except OSError as error:
        raise OSError(error.errno, f"{name} cannot be decompressed: {error.strerror}", str(partial)) from error
    finally:
        partial.unlink(missing_ok=True)
    return copy


def _blocks(name: str, path: Path, compression: str) -> Iterator[bytes]:
    import pyarrow

    try:
        with pyarrow.input_stream(str(path), compression=compression) as stream:
            while block := stream.read(1 << 20):
                yield block
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{name}: damaged or cut off, it cannot be decompressed: {error}") from error


@functools.cache
def _temporary() -> Path:
    """A directory that is removed when this process, and not one forked off it, ends."""
    folder, owner = Path(tempfile.mkdtemp(prefix="lathe-")), os.getpid()
    atexit.register(lambda: shutil.rmtree(folder, ignore_errors=True) if os.getpid() == owner else None)
    return folder


def _refuse_commas(name: str) -> None:
    if "," in name:
        apart = " ".join(filter(None, (part.strip() for part in name.split(","))))
        raise ValueError(f"{name}: write sources apart by spaces, not by commas: {apart}")


def _open_dataset(name: str, config: str | None, split: str | None) -> Table:
    """A hub data set, or a directory by the rules of `datasets`."""
    base, *rest = os.path.expanduser(name).split(":")
    looks_like_file = base.startswith((".", "/", "~")) or _kind(Path(base)) or Path(base).suffix in _COMPRESSED
    if not Path(base).is_dir():
        _refuse_commas(name)
        if looks_like_file or base.count("/") > 1 or not base:
            raise ValueError(f"{name}: there is no such file")
    if len(rest) > 2:
        raise ValueError(f"{name}: write a data set as name, name:config or name:config:split")
    parts = [*rest, "", ""]
    config, split = parts[0] or config, parts[1] or split
    import datasets

    from data.preparation.arrow import check_schema, json_rows

    try:
        if _is_saved(Path(base)):
            data = datasets.load_from_disk(base)
        else:
            data = datasets.load_dataset(base, config, **({"split": split} if split else {}))
    except Exception as error:  # hub, network, builders and file readers each raise their own
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"{name}: no file, and no data set could be loaded ({reason})") from error
    if isinstance(data, datasets.DatasetDict):
        if split is None and len(data) == 1:
            split = next(iter(data))
        if split not in data:
            raise ValueError(f"{name}: choose one of its splits with --split: {', '.join(data)}")
        data = data[split]
    fingerprint = getattr(data, "_fingerprint", None) or os.urandom(8).hex()
    identity = f"{name} {config} {split} {len(data)} {fingerprint}"
    columns = data.with_format("arrow")  # as stored: rows of text need no picture or sound decoded
    check_schema(name, columns[:0].schema)
    return Table(name, identity, len(data), lambda start, stop: json_rows(columns[start:stop]))

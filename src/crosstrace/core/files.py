"""Files that are never half-written: each is written beside its place, then renamed."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from crosstrace.core.errors import UserError

# What PyYAML raises. A date like 2020-99-99, a list as a key, or endless brackets raise none of its own errors.
NO_YAML = (yaml.YAMLError, ValueError, TypeError, RecursionError)

PARTIAL = ".partial-"


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A path beside `path` to write a file or a folder to: renamed at the end, removed on an exception.

    Whoever reads `path` sees the old content or the new, never a part of it.
    """
    path = Path(os.path.normpath(path))  # a/../a could not be found while a is replaced
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{PARTIAL}{os.getpid()}-{path.name}")
    remove(partial)
    try:
        yield partial
        sync(partial)
        install(partial, path)
    except BaseException:
        remove(partial)
        raise


def write_text(path: str | Path, text: str) -> None:
    """Write `text` as UTF-8, atomically, making the parent folders."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8", newline="\n")


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` as strict JSON, atomically: NaN and infinities become null, other floats keep every bit.

    Arrays and tensors become lists, paths strings.
    """
    write_text(path, json.dumps(plain_values(value), indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def expanded(path: str | Path) -> Path:
    """A path with ~ and ~user resolved; the name of an unknown user stays as it is written, so no such path exists."""
    return Path(os.path.expanduser(path))


def read_json(path: str | Path) -> Any:
    """Read JSON; a missing or broken file is a `UserError` that names it."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; the step that writes it has not run") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON ({error}); it was edited or damaged") from None


def sha256_file(path: str | Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_tree(path: str | Path) -> str:
    """SHA-256 of a file or folder: of its files' relative paths and contents, not of times or permissions."""
    return tree_hash(contents_of(Path(path)))


def linked(source: str, target: str) -> str:
    """Give a file that is never changed in place a second name; copy it if files can't have two names here."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
    return target


def remove_folder(folder: Path) -> None:
    """Delete a folder, if it is there. It is renamed first, so a half-deleted one never passes for a whole one."""
    doomed = folder.with_name(f".removed-{folder.name}")  # a name that nobody gives to a folder that is to stay
    remove(doomed)  # an earlier removal may have been interrupted
    if folder.exists():
        folder.rename(doomed)
        remove(doomed)


def plain_values(value: Any) -> Any:
    """`value` in JSON's own types."""
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(name): plain_values(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain_values(item) for item in value]
    if hasattr(value, "tolist"):  # numpy and torch
        return plain_values(value.tolist())
    return str(value) if isinstance(value, Path) else value


def files_below(path: Path) -> dict[str, Path]:
    """Every file of a folder by its relative POSIX path, sorted; a single file under the name "."."""
    if path.is_file():
        return {".": path}
    files = [Path(base, name) for base, _, names in os.walk(path) for name in names]
    return dict(sorted((file.relative_to(path).as_posix(), file) for file in files))


def contents_of(path: Path) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of each file of a folder, by its relative path."""
    return {name: file_entry(file) for name, file in files_below(path).items()}


def file_entry(file: Path) -> dict[str, Any]:
    return {"size": file.stat().st_size, "sha256": sha256_file(file)}


def tree_hash(contents: Mapping[str, Mapping[str, Any]]) -> str:
    return digest_of([[name, entry["sha256"]] for name, entry in contents.items()])


def digest_of(value: Any) -> str:
    """SHA-256 of a value as JSON, in hexadecimal."""
    return hashlib.sha256(json.dumps(plain_values(value), sort_keys=True, allow_nan=False).encode()).hexdigest()


def sync(path: Path) -> None:
    """Have a file, or a folder with all that it holds, written to the disk, before a rename makes it count."""
    folders = [Path(base) for base, _, _ in os.walk(path)]
    for item in [*files_below(path).values(), *folders]:
        handle = os.open(item, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def install(partial: Path, target: Path) -> None:
    """Rename a complete file or folder to its final name, over what may be there."""
    if target.is_dir() or (partial.is_dir() and target.exists()):
        # A folder cannot be renamed over another: between the two renames there is neither, never a half.
        aside = target.with_name(f"{PARTIAL}{os.getpid()}-old-{target.name}")
        os.rename(target, aside)
        os.rename(partial, target)
        remove(aside)
    else:
        os.replace(partial, target)
    handle = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def partial_path(target: Path) -> Path:
    return target.with_name(PARTIAL + target.name)


def remove(path: Path) -> None:
    """Delete a file or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)

"""The run folder: finished steps under their names, unfinished ones only under `.partial-` paths.

A run may be killed at any moment (SIGKILL, power loss) and resumed. A step is a name, a key and a function: the name is
the path of its output inside the folder, the key is everything the output depends on, and the function writes the
output. A step is skipped if its record has the same key and its files still have their recorded bytes. Any other is
built again. This module knows nothing of what a step computes. It needs `flock` (Linux, macOS; not a network file
system without locks).

    <folder>/config.yaml              what the run was started with
    <folder>/manifest/RUN             marks the folder as a crosstrace run
    <folder>/manifest/<step>.json     one record per finished step ("/" in its name is written %2F)
    <folder>/manifest/started/        when the steps that keep their partial folder began
    <folder>/manifest/left_out/       parts that failed and that the run does without (see core/left_out.py)
    <folder>/<step>                   a finished file or folder
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal, TypeVar
from urllib.parse import quote, unquote

from crosstrace.core.errors import UserError
from crosstrace.core.files import (
    PARTIAL,
    contents_of,
    digest_of,
    expanded,
    file_entry,
    files_below,
    install,
    partial_path,
    read_json,
    remove,
    remove_folder,
    sha256_file,
    sync,
    tree_hash,
    write_json,
    write_text,
)
from crosstrace.core.parents import end_with_parent
from crosstrace.core.provenance import version_of

if TYPE_CHECKING:
    from crosstrace.core.processes import Processes
from crosstrace.core.locks import WORKERS_PATIENCE, lock_folder, lock_workers
from crosstrace.core.same_settings import check_config

T = TypeVar("T")

Mode = Literal["new", "resume", "overwrite"]


class MissingStep(UserError):
    """A step is needed that is not finished; `step` is its name."""

    def __init__(self, step: str, message: str):
        super().__init__(message)
        self.step = step

    def __reduce__(self) -> tuple[type, tuple[str, str]]:
        return type(self), (self.step, str(self))


class Run:
    """One run folder, locked while this object is open; use it in a `with` block or `close()` it.

    `Run.create` opens it for the process that leads the experiment, `Run.attach` for its worker processes, and
    `Run.together` for processes that go through all of its steps side by side, of which the first leads.

    Attributes:
        folder: where it is.
        processes: those that work on it side by side, this one among them; None if this one works alone.
    """

    def __init__(self, folder: Path, lock: IO[str] | None, processes: Processes | None = None):
        self.folder, self.processes = folder, processes
        self._lock = lock
        self._ended = threading.Event()
        self._intact: set[tuple[str, str]] = set()  # (step, output hash) whose bytes this process has checked

    @classmethod
    def create(cls, folder: str | Path, config_text: str | None, mode: Mode = "new") -> Run:
        """Make or reopen a run folder, lock it, and clear away what a killed process left half-done.

        Args:
            folder: the run folder; its parents are made.
            config_text: the resolved configuration as YAML, saved as config.yaml; None takes the saved one.
            mode: "new": the folder must be missing or empty. "resume": the saved configuration must be equal; a missing
                or empty folder is begun, since a run may be killed before it has written anything. "overwrite": an
                earlier run is removed first; a folder that holds no run is never touched.

        Raises:
            UserError: the folder does not fit the mode, its configuration differs, or another process works in it.
        """
        folder = expanded(folder).resolve()
        state = _state(folder)
        if state == "foreign":
            raise UserError(
                f"{folder} is not empty and holds no crosstrace run, so nothing in it was touched; choose "
                "another folder (--resume and --overwrite work only on a folder that crosstrace made)"
            )
        if mode == "new" and state == "run":
            raise UserError(
                f"{folder} already holds a crosstrace run; continue it with --resume, replace it with "
                "--overwrite, or choose another folder"
            )
        if config_text is None and state == "blank":
            raise UserError(f"{folder} holds no crosstrace run; start one first with `crosstrace run` or `demo`")
        lock = lock_folder(folder)
        try:
            if mode == "overwrite" and state == "run":
                aside = folder.with_name(f".{folder.name}.replaced-{os.getpid()}")
                os.rename(folder, aside)
                lock.close()
                lock = lock_folder(folder)
            for old in folder.parent.iterdir():  # also what a killed overwrite left
                if old.name.startswith(f".{folder.name}.replaced-") and _state(old) != "foreign":
                    _discard(old)
            if _state(folder) == "blank":
                write_json(folder / "manifest" / "RUN", {"crosstrace": version_of("crosstrace"), "layout": 1})
            elif mode == "new":  # another process began it between the first look and the lock
                raise UserError(f"{folder} was just begun by another process; continue it with --resume")
            saved = folder / "config.yaml"
            if not saved.exists():
                if config_text is None:
                    raise UserError(f"{saved} is missing, so the run cannot be continued; start again with --overwrite")
                write_text(saved, config_text)
            elif config_text is not None and check_config(saved, config_text):
                write_text(saved, config_text)
            run = cls(folder, lock)
            lock_workers(folder, fcntl.LOCK_EX, WORKERS_PATIENCE).close()
            run.clean()
            return run
        except BaseException:
            lock.close()
            raise

    @classmethod
    def together(
        cls, folder: str | Path, config_text: str | None, mode: Mode = "new", processes: Processes | None = None
    ) -> Run:
        """As `create`, in several processes at once. They must see one file system.

        The first process makes, locks and records. All processes go through the same steps in the same order.

        Raises:
            UserError: as `create`, in all of them; or a process does not see the folder.
        """
        if processes is None:
            return cls.create(folder, config_text, mode)
        led: list[Run] = []

        def lead() -> Path:
            led.append(cls.create(folder, config_text, mode))
            return led[0].folder

        place = processes.by_first(lead)
        run = led[0] if led else cls(place, None)
        run.processes = processes
        blind = [rank for rank, sees in enumerate(processes.gathered((place / "config.yaml").is_file())) if not sees]
        if blind:
            run.close()
            raise UserError(
                f"process {blind[0]} of {processes.size} does not see {place}, which process 0 has made; expected a "
                "folder on a file system that all processes share"
            )
        return run

    @property
    def leads(self) -> bool:
        """Whether this process is the one that writes; if several work on the run, it is the first."""
        return self.processes is None or self.processes.rank == 0

    def alone(self, fn: Callable[[], T]) -> T:
        """The result of fn(), which the leading process calls as if it worked alone; the others wait.

        All get its result, which must be small, or the `UserError` that it raised.
        """
        processes = self.processes
        if processes is None:
            return fn()

        def unaccompanied() -> T:
            self.processes = None
            try:
                return fn()
            finally:
                self.processes = processes

        return processes.by_first(unaccompanied)

    @classmethod
    def attach(cls, folder: str | Path) -> Run:
        """Open the run in a worker process that its leading process started.

        A worker ends within a second of its parent, so nobody writes any more after an experiment was killed. Until
        then, `create` in another process waits.
        """
        folder = expanded(folder).resolve()
        ended = threading.Event()
        end_with_parent(os.getppid(), ended)
        run = cls(folder, lock_workers(folder, fcntl.LOCK_SH, WORKERS_PATIENCE))
        run._ended = ended
        with suppress(UserError):
            lock_folder(folder).close()
            run.close()
            raise RuntimeError(f"the process that led the run in {folder} is gone, so its worker ends")
        return run

    def close(self) -> None:
        """Release the folder."""
        self._ended.set()
        if self._lock is not None:
            self._lock.close()

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @property
    def config_text(self) -> str:
        """The saved configuration, YAML."""
        return (self.folder / "config.yaml").read_text(encoding="utf-8")

    def path(self, name: str) -> Path:
        """The path of step `name`'s output, a relative POSIX path inside the folder."""
        parts = name.split("/")
        if any(not part or part.startswith(".") for part in parts) or name in ("config.yaml", "manifest"):
            raise ValueError(f"{name!r} cannot name a step: it must be a plain relative path inside the run folder")
        return self.folder.joinpath(*parts)

    def stage(self, name: str, key: Any, fn: Callable[[Path], object], *, keep_partial: bool = False) -> Path:
        """The output of step `name`. If it is not complete for `key`, `fn` builds it.

        `fn(partial)` makes a file or a folder at `partial`, which does not exist; its parent does. When `fn` returns,
        the output is synced, renamed to `path(name)`, and only then recorded. Several processes may build different
        steps at once. If processes work on the run side by side, all of them call `fn` with the same path. What they
        don't write together (`pieces.write`) is written by the one that `leads`.

        Args:
            name: the output's path inside the folder, e.g. "models/mixed" or "results.json"; no step's output may lie
                inside another's.
            key: JSON-able: the settings that the output depends on, and `inputs(...)` of the steps it reads.
            fn: writes the output.
            keep_partial: after a kill or an exception, the next attempt *with the same key* has the partial folder as
                it was left, and goes on from it (training checkpoints). `fn` removes what must not stay in the output.
        """
        target = self.path(name)
        earlier = self.alone(lambda: self._begin(name, key, keep_partial))
        if earlier is None:
            return target
        partial, clock = partial_path(target), time.perf_counter()
        try:
            fn(partial)
        except BaseException:
            if not keep_partial and self.leads:
                remove(partial)
            raise
        self.alone(lambda: self._finish(name, key, earlier + time.perf_counter() - clock))
        return target

    def _begin(self, name: str, key: Any, keep_partial: bool) -> float | None:
        """Prepare for the step to be built; the seconds spent on what was kept of it, or None if it is complete."""
        if self.complete(name, key):
            return None
        for other in self._records():
            if other.startswith(f"{name}/") or name.startswith(f"{other}/"):
                raise ValueError(f"steps {other!r} and {name!r} overlap: one's output would lie inside the other's")
        target = self.path(name)
        partial, started = partial_path(target), self._started(name)
        key_hash, earlier = digest_of(key), 0.0
        before = read_json(started) if started.exists() else {}
        if keep_partial and before.get("key") == key_hash and partial.exists():
            earlier = before["seconds"] + max(0.0, _newest(partial) - before["began"])
        else:
            remove(partial)
        if keep_partial:
            write_json(started, {"key": key_hash, "began": time.time(), "seconds": earlier})
        target.parent.mkdir(parents=True, exist_ok=True)
        return earlier

    def _finish(self, name: str, key: Any, seconds: float) -> None:
        """Rename the step's output to its final path, and record it."""
        target = self.path(name)
        partial = partial_path(target)
        if not partial.exists():
            raise FileNotFoundError(f"step {name!r} wrote nothing to the path it was given, {partial}")
        contents = contents_of(partial)
        record = {
            "step": name,
            "key": digest_of(key),
            "hash": tree_hash(contents),
            "seconds": seconds,
            "files": contents,
            "depends_on": key,
        }
        sync(partial)
        install(partial, target)
        write_json(self._record(name), record)
        self._started(name).unlink(missing_ok=True)
        self._intact.add((name, record["hash"]))

    def is_there(self, name: str) -> bool:
        """Whether step `name` was finished, whatever its key, and its files have their recorded bytes."""
        record = self._read_record(name)
        return record is not None and self._is_intact(name, record)

    def complete(self, name: str, key: Any) -> bool:
        """Whether step `name` was finished with an equal `key` and its files have their recorded bytes."""
        record = self._read_record(name)
        return record is not None and record["key"] == digest_of(key) and self._is_intact(name, record)

    def inputs(self, *names: str) -> dict[str, str]:
        """The output hash of each finished step of `names`, for the key of a step that reads them.

        Raises:
            UserError: a step is not finished, or its files were changed since.
        """
        hashes = {}
        for name in names:
            record = self._read_record(name)
            if record is None:
                raise MissingStep(
                    name, f"{self.folder} has no finished {name!r} yet; run the stage that makes it first"
                )
            if not self._is_intact(name, record):
                raise UserError(
                    f"{self.path(name)} is not as the run left it (a file is missing or changed); "
                    "run the stage that makes it again"
                )
            hashes[name] = record["hash"]
        return hashes

    def drop(self, name: str, folders: Sequence[str], told: str, added: Sequence[str] = ()) -> None:
        """Remove some folders of a finished step's output, when nothing needs them any more.

        The step stays finished, and its hash stays what it was, so no step that reads it is done again. A kill at any
        moment leaves the step finished, and the next call removes the rest.

        Args:
            folders: names right below the output.
            told: why, and what to do where they are wanted; `dropped` gives it.
            added: folders that were put there since the step was finished, and are part of its output from now on.
        """
        record, target = self._read_record(name), self.path(name)
        assert record is not None, f"step {name!r} is not finished"
        files = {path: entry for path, entry in record["files"].items() if _top_folder(path) not in folders}
        for path, file in files_below(target).items():
            if _top_folder(path) in added and path not in files:
                files[path] = file_entry(file)
        if files != record["files"]:
            write_json(self._record(name), record | {"files": files, "dropped": told})
        for folder in folders:  # only now: the record no longer asks for them
            remove_folder(target / folder)

    def forget(self, name: str) -> None:
        """Forget that a step was finished, so that it is built again."""
        self._record(name).unlink(missing_ok=True)

    def dropped(self, name: str) -> str | None:
        """What `drop` was told of a finished step; None if it is whole, or not finished."""
        record = self._read_record(name)
        return None if record is None else record.get("dropped")

    def seconds(self) -> dict[str, float]:
        """Seconds spent in each finished step, also in killed attempts whose partial folder was kept."""
        records = {name: self._read_record(name) for name in self._records()}
        return {name: record["seconds"] for name, record in records.items() if record}

    def _record(self, name: str) -> Path:
        return self.folder / "manifest" / f"{quote(name, safe='')}.json"

    def _started(self, name: str) -> Path:
        return self.folder / "manifest" / "started" / self._record(name).name

    def _records(self) -> list[str]:
        """The names of all finished steps."""
        files = (self.folder / "manifest").glob("[!.]*.json")
        return sorted(unquote(file.name.removesuffix(".json")) for file in files)

    def _read_record(self, name: str) -> dict[str, Any] | None:
        """The record of a finished step; None if there is none."""
        try:
            record = json.loads(self._record(name).read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError, RecursionError):
            return None
        # a damaged record counts as none: the step is built again
        kinds = {"key": str, "hash": str, "seconds": (int, float), "files": dict}
        whole = isinstance(record, dict) and all(isinstance(record.get(name), kind) for name, kind in kinds.items())
        whole = whole and all(isinstance(e, dict) and {"size", "sha256"} <= e.keys() for e in record["files"].values())
        return record if whole else None

    def _is_intact(self, name: str, record: Mapping[str, Any]) -> bool:
        """Whether every recorded file has its recorded size and SHA-256; files beside them do not matter."""
        if (name, record["hash"]) in self._intact:
            return True
        files = files_below(self.path(name))
        intact = self.path(name).exists() and all(
            (file := files.get(path)) is not None
            and file.stat().st_size == entry["size"]
            and sha256_file(file) == entry["sha256"]
            for path, entry in record["files"].items()
        )
        if intact:
            self._intact.add((name, record["hash"]))
        return intact

    def clean(self) -> None:
        """Remove what ended processes left half-written, save folders that a step asked to keep (inside those too)."""
        for base, folders, files in os.walk(self.folder):
            # the runs of a study are cleared by those who go on with them
            folders[:] = [entry for entry in folders if not Path(base, entry, "manifest", "RUN").is_file()]
            for entry in [entry for entry in [*folders, *files] if entry.startswith(PARTIAL)]:
                step = (Path(base).relative_to(self.folder) / entry.removeprefix(PARTIAL)).as_posix()
                if not self._started(step).exists():
                    remove(Path(base, entry))
                    if entry in folders:
                        folders.remove(entry)
        for started in (self.folder / "manifest" / "started").glob("*.json"):
            if not partial_path(self.path(unquote(started.name.removesuffix(".json")))).exists():
                started.unlink()


def _top_folder(path: str) -> str:
    return path.partition("/")[0]


def _walk(folder: Path) -> Iterator[str]:
    """The relative POSIX path of every file and folder below `folder`."""
    for base, folders, files in os.walk(folder):
        for name in [*folders, *files]:
            yield Path(base, name).relative_to(folder).as_posix()


def _newest(path: Path) -> float:
    """When the last file below `path` was written, seconds since the epoch."""
    return max((file.stat().st_mtime for file in files_below(path).values()), default=0.0)


def _state(folder: Path) -> Literal["blank", "run", "foreign"]:
    """What is at `folder`: nothing (or what a run left that was killed at its very start), a run, or something else."""
    if not folder.exists():
        return "blank"
    if not folder.is_dir():
        return "foreign"
    with suppress(OSError, ValueError, TypeError):
        if "crosstrace" in json.loads((folder / "manifest" / "RUN").read_text(encoding="utf-8")):
            return "run"
    leftovers = re.compile(rf"manifest(/lock|/workers|/{re.escape(PARTIAL)}\d+-RUN)?")
    return "blank" if all(leftovers.fullmatch(path) for path in _walk(folder)) else "foreign"


def _discard(folder: Path) -> None:
    """Delete a run. Its mark goes last, so that the rest of a killed deletion is still known as a run."""
    for item in folder.iterdir():
        if item.name != "manifest":
            remove(item)
    for item in (folder / "manifest").glob("*"):
        if item.name != "RUN":
            remove(item)
    remove(folder)

"""A study: one experiment over a grid of settings and seeds, every run resumable, and one table of them all.

A study's file has what all runs have in common, what varies, and the seeds. Each combination is a run of its own in
STUDY/runs/<setting>/<seed>. Several are made at once within a budget of cores and memory. A complete run is never made
again. The table (table.parquet, table.csv) has a row for each run and strategy. From it `summary.py` computes intervals
over seeds, and which measures predict recall. Nothing is measured here.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml

from crosstrace.core import left_out
from crosstrace.core.errors import UserError
from crosstrace.core.files import read_json, remove_folder, replacing, sha256_file, write_json, write_text
from crosstrace.core.left_out import Part, attempt
from crosstrace.core.progress import Progress
from crosstrace.core.provenance import metadata
from crosstrace.core.run_folder import Run
from crosstrace.experiment import config
from crosstrace.experiment.analysis import ANALYSES
from crosstrace.experiment.config import Experiment
from crosstrace.experiment.job_queue import JobQueue, make_executor, write_command
from crosstrace.experiment.registry import stages
from crosstrace.experiment.run_pool import GIB, RunPool, width
from crosstrace.experiment.study_settings import Planned, StudySettings, plain, plan
from crosstrace.results.results import Results
from crosstrace.results.run import RunInfo
from crosstrace.results.study import SCHEMA, StudyResults

Row = dict[str, Any]

HEAVY = ("models", "traces", "shared", "data")  # folders that a complete run no longer needs


def run(study: StudySettings, folder: Path, mode: str = "new", *, quiet: bool = False) -> StudyResults:
    """Make every run of a study that is not complete, then the table, the findings and the report.

    Args:
        study: the grid and its budget.
        folder: the study's folder.
        mode: `new` (an existing study is an error), `resume` or `overwrite`. A resumed study may have more or fewer
            seeds and points than before: complete runs stay. A point or common setting whose meaning has changed under
            its old name is refused run by run, since it would replace results.
        quiet: no progress on stderr.

    Returns:
        the findings.

    Raises:
        UserError: bad settings, a folder that holds something else, or runs that failed. All others are made first.
    """
    from crosstrace.experiment.study_page import write_study
    from crosstrace.report.rows import to_csv

    runs = plan(study)
    for planned in runs:
        if study.executor != "slurm" and width(planned) > _cores(study):
            raise UserError(
                f"run {planned.label} uses {width(planned)} cores (jobs × threads), but the budget is "
                f"{_cores(study)}; set experiment.jobs: 1 and experiment.threads: 1, or give the study more cores"
            )
    _check_settings(runs, whole=mode != "resume")
    if study.executor != "processes":
        with TemporaryDirectory() as logs:
            make_executor(study.executor, study.job, Path(logs))
    with Run.create(folder, yaml.safe_dump({"study": study.name}), mode) as opened:  # type: ignore[arg-type]
        text = yaml.safe_dump(plain(study), sort_keys=False, allow_unicode=True)
        write_text(opened.folder / "study.yaml", text)
        machine = metadata()
        write_json(opened.folder / "metadata.json", machine)
        progress = Progress(quiet)
        failed = _make(opened, runs, study, progress)
        done = [run for run in runs if _is_made(opened, run)]
        if not done:
            raise UserError(f"no run of the study was made: {failed[0] if failed else 'there is none'}")
        reports = [_Report.read(opened.path(_step(planned))) for planned in done]
        rows = [row for planned, report in zip(done, reports) for row in _rows(planned, report.results)]
        results = _findings(opened, study, _compared(study, runs), done, reports, rows, machine, progress)
        results.failed = failed
        # always written anew: that takes seconds, and a later version of crosstrace may say more about the same runs
        write_text(opened.folder / "table.csv", to_csv(rows))
        with replacing(opened.folder / "table.parquet") as partial:
            _to_parquet(rows, partial)
        write_json(opened.folder / "results.json", results.as_values())
        write_study(results, rows, opened.folder / "report")
    if failed:
        raise UserError(
            f"{len(failed)} of {len(runs)} runs failed, first {failed[0]}; the report is of the others, and the same "
            "command with --resume tries them again"
        )
    return results


def _check_settings(runs: Sequence[Planned], whole: bool) -> None:
    """Raise a `UserError` if the experiment of a setting is unfit; now, rather than after hours."""
    from crosstrace.experiment import checks

    by_setting = {planned.setting: planned for planned in reversed(runs)}
    for planned in by_setting.values():
        checks.check(planned.experiment, whole=whole)


def commands(study: StudySettings, folder: Path, mode: str = "new") -> list[list[str]]:
    """The commands that make the runs of a study that are not complete, one each, for whatever starts them.

    The study with `resume` collects what they have made.

    Raises:
        UserError: as `run`.
    """
    runs = plan(study)
    _check_settings(runs, whole=mode != "resume")
    with Run.create(folder, yaml.safe_dump({"study": study.name}), mode) as opened:  # type: ignore[arg-type]
        write_text(opened.folder / "study.yaml", yaml.safe_dump(plain(study), sort_keys=False, allow_unicode=True))
        waiting = [planned for planned in runs if not opened.complete(_step(planned), _key(planned))]
        return [write_command(opened.folder, planned) for planned in waiting]


def _compared(study: StudySettings, runs: Sequence[Planned]) -> tuple[str, str] | None:
    """The two strategies to compare: those of the study's settings, or the claims' first pair.

    It is None if a run lacks one of the claims' pair.
    """
    usual = runs[0].experiment.pairs[0]
    return study.compare or (usual if all({*usual} <= {*run.experiment.taught} for run in runs) else None)


def _findings(
    opened: Run,
    study: StudySettings,
    compare: tuple[str, str] | None,
    done: Sequence[Planned],
    reports: Sequence[_Report],
    rows: list[Row],
    machine: Mapping[str, Any],
    progress: Progress,
) -> StudyResults:
    """The findings over all runs. A finding that fails is left out."""
    from crosstrace.experiment import summary

    judged = [(planned.setting, report.results.claims) for planned, report in zip(done, reports)]
    first, infos = reports[0].results, [info_of(report.results) for report in reports]
    roles = first.roles
    info = {
        "name": study.name,
        "tasks": roles.as_values(),
        "words": infos[0].words or {},
        "runs": len(done),
        "seeds": study.seeds,
        "settings": {planned.setting: planned.changes for planned in done},
        "strategies": {name: text for info in reversed(infos) for name, text in info.strategies.items()},
        "compare": list(compare or ()),
        "hours": sum(report.seconds for report in reports) / 3600,
        "peak_gib": max(report.peak_bytes for report in reports) / GIB,
    }
    tables: dict[str, list[Row]] = {}
    work = summary.findings(rows, compare, roles) | {"claims": lambda: summary.claims_over_runs(judged)}

    def add(name: str) -> None:
        tables[name] += work[name]()

    for name in work:
        tables[name] = []
        attempt(opened, Part("study", name=name), partial(add, name), progress.note)
    lacking = [{**row.as_values(), "run": planned.label} for planned, report in zip(done, reports)
               for row in report.results.left_out]  # fmt: skip
    machine_info = {name: machine[name] for name in ("cpu", "cores", "device", "platform")}
    # of the runs, not of this process
    machine_info["git"] = _alike(info.git for info in infos)
    names = dict.fromkeys(name for report in reports for name in report.results.versions)
    versions = {name: _alike(report.results.versions.get(name) for report in reports) for name in names}
    lacking += [{"run": "", **row} for row in left_out.rows(opened)]
    values = {
        "schema": SCHEMA,
        "study": info,
        **tables,
        "left_out": lacking,
        "machine": machine_info,
        "versions": versions,
    }
    return StudyResults.of(values)


def _alike(values: Iterable[Any]) -> Any:
    """The value that all runs have, or all different values, as text."""
    distinct = list(dict.fromkeys(map(str, values)))
    return distinct[0] if len(distinct) == 1 else ", ".join(distinct)


@dataclass(frozen=True)
class _Report:
    """What the study keeps of a run: its results, the seconds that it took, and its peak memory in bytes."""

    results: Results
    seconds: float
    peak_bytes: int

    @classmethod
    def read(cls, path: Path) -> _Report:
        values = read_json(path)
        return cls(Results.of(values["results"], str(path)), values["seconds"], values["peak_bytes"])


def info_of(results: Results) -> RunInfo:
    """What was run. The results must be those of a complete run."""
    assert results.run is not None
    return results.run


def _cores(study: StudySettings) -> int:
    """Cores that all runs may use together."""
    affinity = getattr(os, "sched_getaffinity", None)  # not on every system
    return study.cores or (len(affinity(0)) if affinity else os.cpu_count() or 1)


def _step(planned: Planned) -> str:
    """The step of the study's folder that holds a run's results."""
    return f"results/{planned.label}.json"


def _key(planned: Planned) -> dict[str, Any]:
    """What a run's results depend on.

    Settings at their defaults are not part of it, so new settings of a later version make no run again. The
    run's name and its number of jobs are no part of it either.
    """
    from crosstrace.experiment.examples import tasks_key
    from crosstrace.experiment.studied import model_key

    changed = _changed(config.deciding(planned.experiment), config.deciding(Experiment()))
    changed = {name: value for name, value in changed.items() if name not in ("jobs", "name")}
    text = planned.experiment.retention.text
    content = {"text": sha256_file(text)} if text and Path(text).is_file() else {}
    files = tasks_key(planned.experiment.tasks)["content"]
    content |= {"tasks": files} if files else {}
    return {"experiment": changed, "model": model_key(planned.experiment), **content}


def _changed(values: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that differ from their defaults."""
    changed = {}
    for name, value in values.items():
        default = defaults.get(name)
        if value != default:
            nested = isinstance(value, dict) and isinstance(default, dict) and name not in ("strategies", "tasks")
            changed[name] = _changed(value, default or {}) if nested else value
    return changed


def _is_made(opened: Run, planned: Planned) -> bool:
    """Whether there are results of a run, with or without parts left out."""
    return any(opened.complete(_step(planned), key) for key in (_key(planned), _key_without(planned)))


def _key_without(planned: Planned) -> dict[str, Any]:
    """The key of results with parts left out. Such a run is tried again."""
    return _key(planned) | {"left_out": True}


def _make(opened: Run, runs: Sequence[Planned], study: StudySettings, progress: Progress) -> list[str]:
    """Make the runs that are not complete, as many at once as the budget allows; returns what failed and why."""
    waiting = [planned for planned in runs if not opened.complete(_step(planned), _key(planned))]
    expected = max((read_json(opened.path(_step(p)))["peak_bytes"] for p in runs if _is_made(opened, p)), default=0)
    memory = study.memory * GIB if study.memory else None
    if waiting and memory is not None and expected > memory:
        raise UserError(
            f"a run of the study needed {expected / GIB:.1f} GiB, but the budget is {study.memory:g} GiB; give it more"
        )
    done = len(runs) - len(waiting)
    if done:
        progress.done(f"{done} of {len(runs)} runs are complete", 0.0)
    if study.executor == "processes":
        pool: RunPool | JobQueue = RunPool(opened.folder / "runs", _cores(study), memory, expected, progress)
    else:
        widest = max(width(planned) for planned in runs)
        most = max(1, _cores(study) // widest) if study.executor == "local" else None
        pool = JobQueue(opened.folder, study.executor, {"cpus_per_task": widest, **study.job}, most, progress)
    with closing(pool.make(waiting)) as made:
        for item in made:
            seconds = time.time() - item.began
            _keep(opened, item.planned, item.home, item.peak, study.keep)
            done += 1
            progress.done(f"{item.planned.label} ({done} of {len(runs)})", seconds)
    return pool.failed


def _keep(opened: Run, planned: Planned, home: Path, peak: int, keep: str) -> None:
    """Save a finished run's results in the study, and remove its folders that are no longer needed.

    A run with parts left out is tried again, so it keeps all folders.
    """
    results = read_json(home / "results.json")
    results["units"] = {}  # most of the file, and no study reads them; the run's own results.json has them

    def make(path: Path) -> None:
        info = {"points": planned.points, "seed": planned.seed, "peak_bytes": peak}
        write_json(path, info | {"seconds": sum(results["seconds"].values()), "results": results})

    lacking = bool(results["left_out"])
    opened.stage(_step(planned), _key_without(planned) if lacking else _key(planned), make)
    if keep == "results" and not lacking:
        for name in HEAVY:
            remove_folder(home / name)


def _rows(planned: Planned, results: Results) -> list[Row]:
    """One row for each strategy of a run: its place in the grid, and everything that was measured."""
    from crosstrace.experiment.summary import measures

    labels: Row = {"setting": planned.setting}
    labels |= {f"vary.{axis}": point for axis, point in planned.points.items()} | {"seed": planned.seed}
    return [
        labels | {"strategy": name} | measures(results, name) | _of_extensions(results, name)
        for name in planned.experiment.taught
    ]


def _of_extensions(results: Results, name: str) -> Row:
    """The numbers of other packages' analyses and stages, each under the name of its record."""
    row: Row = {}
    for records, tables in ((ANALYSES, results.mechanism.rest), (stages(), results.stages)):
        for record in (records[part] for part in tables if part in records):
            if record.numbers is not None and name in tables[record.name]:
                numbers = record.numbers(tables[record.name][name])
                row |= {f"{record.name}.{key}": value for key, value in numbers.items()}
    return row


def _to_parquet(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    names = dict.fromkeys(name for row in rows for name in row)
    pyarrow.parquet.write_table(pyarrow.table({name: [row.get(name) for row in rows] for name in names}), path)

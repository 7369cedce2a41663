"""A study as jobs: of submitit on this machine, of a cluster (played by three scripts), or by its commands."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from test_study import GRID, file_of, parsed, table

from crosstrace.cli import commands
from crosstrace.core.errors import UserError
from crosstrace.core.files import write_json
from crosstrace.core.progress import Progress
from crosstrace.experiment import job_queue, study, study_settings

pytest.importorskip("submitit")

ONE: dict[str, Any] = {"vary": {}, "seeds": [1]}
# Slurm's commands, as far as submitit reads them: a job is a process of this machine
SBATCH = r"""#!/usr/bin/env bash
set -e
echo x >> {home}/submitted
id=$(wc -l < {home}/submitted)
SLURM_JOB_ID=$id SLURM_JOBID=$id setsid bash "$1" > /dev/null 2>&1 < /dev/null &
echo $! > {home}/$id.pid
echo "Submitted batch job $id"
"""
SRUN = r"""#!/usr/bin/env bash
while [[ "$1" == --* ]]; do if [[ "$1" == --output || "$1" == --error ]]; then shift; fi; shift; done
export SLURM_NTASKS=1 SLURM_PROCID=0 SLURM_LOCALID=0 SLURM_NODEID=0 SLURM_JOB_NUM_NODES=1 SLURM_JOB_NODELIST=here
exec "$@"
"""
SACCT = r"""#!/usr/bin/env bash
echo "JobID|State|NodeList"
for file in {home}/*.pid; do
    state=COMPLETED; kill -0 "$(cat "$file")" 2> /dev/null && state=RUNNING
    echo "$(basename "$file" .pid)|$state|here"
done
"""


@pytest.fixture(scope="module")
def ordinary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ordinary") / "study"
    study.run(parsed(**ONE), folder, quiet=True)
    return folder


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with what was submitted to the cluster."""
    home = tmp_path / "slurm"
    home.mkdir()
    for name, text in {"sbatch": SBATCH, "srun": SRUN, "sacct": SACCT}.items():
        script = home / name
        script.write_text(text.replace("{home}", str(home)))
        script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{home}:{os.environ['PATH']}")
    return home


@pytest.mark.long
def test_jobs_of_this_machine_come_to_the_same(ordinary: Path, tmp_path: Path) -> None:
    folder = tmp_path / "local"
    study.run(parsed(**ONE, executor="local", job={"timeout_min": 10}), folder, quiet=True)
    assert table(folder) == table(ordinary) != []
    results = study.run(parsed(**ONE), folder, "resume", quiet=True)  # there is nothing left to do
    assert results.study.peak_gib > 0.1


@pytest.mark.long
def test_the_commands_are_listed_and_what_they_made_is_collected(
    ordinary: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    file, folder = file_of(tmp_path, GRID | ONE), tmp_path / "listed"
    commands.main(["study", str(file), str(folder), "--list"])
    (line,) = capsys.readouterr().out.splitlines()
    assert shlex.split(line)[:4] == [sys.executable, "-m", "crosstrace", "run"]
    subprocess.run(shlex.split(line), check=True, cwd=tmp_path, capture_output=True)
    commands.main(["study", str(file), str(folder), "--resume", "--quiet"])
    assert table(folder) == table(ordinary)
    capsys.readouterr()
    commands.main(["study", str(file), str(folder), "--list", "--resume"])
    assert capsys.readouterr().out.strip() == ""


@pytest.mark.long
def test_jobs_of_a_cluster_go_on_and_are_not_submitted_twice(ordinary: Path, tmp_path: Path, slurm: Path) -> None:
    file, folder = file_of(tmp_path, GRID | ONE), tmp_path / "cluster"
    words = ["study", str(file), str(folder), "--quiet", "--executor", "slurm", "--job.slurm_partition", "gpu"]
    process = subprocess.Popen([sys.executable, "-m", "crosstrace", *words])
    until = time.monotonic() + 120
    while not list(folder.glob("jobs/*/*.json")) and time.monotonic() < until:
        time.sleep(0.05)
    process.kill()
    process.wait()
    assert "#SBATCH --partition=gpu" in next((folder / "jobs" / "logs").glob("*.sh")).read_text()
    study.run(parsed(**ONE, executor="slurm"), folder, "resume", quiet=True)
    assert (slurm / "submitted").read_text().split() == ["x"]
    assert table(folder) == table(ordinary)


@pytest.mark.long
def test_a_job_that_fails_says_why(tmp_path: Path) -> None:
    folder = tmp_path / "failing"
    place = folder / "runs" / "default" / "1"
    place.mkdir(parents=True)
    (place / "mine.txt").write_text("not a run")
    (folder / "manifest").mkdir()
    (folder / "manifest" / "RUN").write_text('{"crosstrace": "x", "layout": 1}')
    failing = parsed(vary={}, seeds=[1], executor="local")
    with pytest.raises(UserError, match=r"no run of the study was made: default/1: .* is not empty"):
        study.run(failing, folder, "resume", quiet=True)


def test_what_submitit_does_not_have_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    for executor, parameters, message in [
        ("slurm", {}, "submitit says: Could not detect"),
        ("local", {"timeout": 3}, "submitit says: .*timeout"),
        ("local", {"timeout_min": "soon"}, "submitit says: .*timeout_min"),
    ]:
        with pytest.raises(UserError, match=message):
            study.run(parsed(vary={}, seeds=[1], executor=executor, job=parameters), tmp_path / "new", quiet=True)
        assert not (tmp_path / "new").exists(), "what is refused leaves nothing behind"
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(UserError, match=r"pip install 'crosstrace\[submitit\]'"):
        job_queue.JobQueue(tmp_path, "local", {}, None, Progress(quiet=True))


def test_a_command_that_fails_gives_its_last_line(tmp_path: Path) -> None:
    def run(script: str, *arguments: str, **options: Any) -> int:
        return job_queue.run_command([sys.executable, "-c", script, *arguments], str(tmp_path / "log"), **options)

    script = "import sys; print('x' * 200_000 + '\\ncrosstrace: it is so', file=sys.stderr); sys.exit(int(sys.argv[1]))"
    with pytest.raises(RuntimeError, match=r"^it is so$"):
        run(script, "2")
    assert run(script, "3") >= 0  # parts were left out; the rest is there
    with pytest.raises(RuntimeError, match="exit code 5"):
        run("raise SystemExit(5)")
    with pytest.raises(RuntimeError, match="ended by SIGKILL; out of memory"):
        run("import os; print('a warning', flush=True); os.kill(os.getpid(), 9)")
    with pytest.raises(RuntimeError, match="home is None"):
        run("import os; raise SystemExit(f'home is {os.environ.get(\"HOME\")}')", environment={"HOME": None})
    ended = subprocess.Popen(["true"])
    ended.wait()
    with pytest.raises(RuntimeError, match="the study that started it has ended"):
        run("import time; time.sleep(60)", leader=ended.pid)


STATES = {
    "PENDING": True, "RUNNING": True, "REQUEUED": True, "UNKNOWN": True, "": True, "COMPLETED": False,
    "DEADLINE": False, "OUT_OF_MEMORY": False, "CANCELLED by 3": False, "PREEMPTED": False,
}  # fmt: skip


@pytest.mark.parametrize("state", STATES)
def test_jobs_that_are_gone_are_submitted_again(state: str, tmp_path: Path, slurm: Path) -> None:
    lines = ["#!/usr/bin/env bash", "echo 'JobID|State|NodeList'", f"echo '7|{state}|here'"]
    (slurm / "sacct").write_text("\n".join(lines))
    queue = job_queue.JobQueue(tmp_path, "slurm", {}, None, Progress(quiet=True))
    note = tmp_path / "jobs" / "7.json"
    note.parent.mkdir(exist_ok=True)
    write_json(note, {"job": "7"})
    assert (queue._submitted_job(note) is not None) == STATES[state]
    os.utime(note, (0, 0))  # long ago
    assert (queue._submitted_job(note) is not None) == (STATES[state] and state not in ("UNKNOWN", ""))

    (slurm / "sbatch").write_text("#!/usr/bin/env bash\necho 'sbatch: error: invalid partition: gpuu' >&2; exit 1")
    made = queue.make([study_settings.plan(parsed(**ONE))[0]])
    with pytest.raises(UserError, match=r"default/1 can't be submitted: .*invalid partition"):
        next(made)


def test_a_job_that_succeeded_meanwhile_is_not_submitted_again(tmp_path: Path, slurm: Path) -> None:
    from submitit.core.utils import cloudpickle_dump

    queue = job_queue.JobQueue(tmp_path, "slurm", {}, None, Progress(quiet=True))
    note, result = tmp_path / "jobs" / "7.json", tmp_path / "jobs" / "logs" / "7_0_result.pkl"
    result.parent.mkdir(parents=True, exist_ok=True)
    write_json(note, {"job": "7"})
    (slurm / "sacct").write_text("#!/usr/bin/env bash\necho 'JobID|State|NodeList'\necho '7|COMPLETED|here'")
    cloudpickle_dump(("success", 123), result)
    job = queue._submitted_job(note)
    assert job is not None and job.result() == 123
    cloudpickle_dump(("error", "RuntimeError: no"), result)
    assert queue._submitted_job(note) is None


def test_why_a_job_failed_is_found_in_what_submitit_says() -> None:
    lost = "Job 55 (task: 0) with path /x/55_0_result.pkl\nhas not produced any output (state: OUT_OF_MEMORY)\nError"
    late = "Job (task=0) failed during processing with trace:\n---\nJob not requeued because: timed-out too many times."
    raised = "Job (task=0) failed\n----\nTraceback\n  File\nRuntimeError: the model has no tokens\n---\nYou can check"
    assert "OUT_OF_MEMORY" in job_queue._sentence(Exception(lost))
    assert "timed-out" in job_queue._sentence(Exception(late))
    assert job_queue._sentence(Exception(raised)) == "the model has no tokens"

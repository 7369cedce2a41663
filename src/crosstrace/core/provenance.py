"""What a result was made with: versions of packages, the git revision, the machine."""

from __future__ import annotations

import functools
import os
import platform
import subprocess
from contextlib import suppress
from importlib import metadata as packages
from pathlib import Path
from typing import Any

PACKAGES = ("crosstrace", "torch", "transformers", "accelerate", "tokenizers", "safetensors", "numpy", "scipy")


def versions() -> dict[str, str | None]:
    """The versions of Python and of the packages that results may depend on."""
    return {"python": platform.python_version(), **{name: version_of(name) for name in PACKAGES}}


def metadata() -> dict[str, Any]:
    """What a run was made with: versions, the git revision of crosstrace's checkout if there is one, the machine."""
    import torch  # only here: the run folder itself must open at once

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return {
        "versions": versions(),
        "git": _git_revision(),
        "device": device,
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "platform": platform.platform(),
    }


@functools.cache  # every file of traces and sets names them
def version_of(package: str) -> str | None:
    try:
        return packages.version(package)
    except packages.PackageNotFoundError:
        return None


@functools.cache
def _git_revision() -> str | None:
    """The commit of the checkout that this file is tracked in; "+changed" is appended if files differ."""

    def git(*words: str) -> str:
        folder = Path(__file__).parent
        return subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True, check=True).stdout.strip()

    with suppress(OSError, subprocess.CalledProcessError):
        git("ls-files", "--error-unmatch", Path(__file__).name)  # installed inside another project's repository: none
        return git("rev-parse", "HEAD") + ("+changed" if git("status", "--porcelain", "-uno") else "")
    return None


def _cpu() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()

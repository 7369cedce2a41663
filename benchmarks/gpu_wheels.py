"""Wheels for a machine without a network: what crosstrace needs beside torch and transformers.

    python benchmarks/gpu_wheels.py pack [3.12]    # where there is a network; for this Python, on Linux x86_64
    python benchmarks/gpu_wheels.py install        # there: what is missing, into build/site

`pack` takes the versions that are installed here and all that they need in turn. The largest are left out until the
folder has at most 48 MiB; their names are printed. `install` takes only what is not installed, or is of a version that
does not do. It uses nothing beyond the standard library, pip and packaging.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Callable, Iterable, Mapping
from email.parser import HeaderParser
from importlib import metadata
from pathlib import Path

try:
    from packaging.requirements import Requirement
except ImportError:
    from pip._vendor.packaging.requirements import Requirement

HOME = Path(__file__).resolve().parent.parent
WHEELS, SITE = HOME / "benchmarks/wheels", HOME / "build/site"
MOST = 48 * 2**20  # bytes of all wheels
BESIDE = ("torch", "transformers", "triton")  # which a machine with a GPU has; they are large, and belong together
PLATFORMS = [f"manylinux_2_{minor}_x86_64" for minor in (39, 35, 34, 31, 28, 27, 24, 17, 12, 5)]
PLATFORMS += ["manylinux2014_x86_64", "manylinux1_x86_64", "linux_x86_64"]


def plain(name: str) -> str:
    """A package's name as an index writes it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def applies(requirement: Requirement, python: str) -> bool:
    """Whether a requirement holds on Linux x86_64 under this Python, without extras."""
    there = {
        "python_version": python, "python_full_version": f"{python}.0", "sys_platform": "linux", "os_name": "posix",
        "platform_system": "Linux", "platform_machine": "x86_64", "implementation_name": "cpython", "extra": "",
    }  # fmt: skip
    return requirement.marker is None or requirement.marker.evaluate(there)


def wanted() -> list[Requirement]:
    """What crosstrace needs, by pyproject.toml, without torch and transformers."""
    project = tomllib.loads((HOME / "pyproject.toml").read_text())["project"]
    every = [Requirement(line) for line in project["dependencies"]]
    return [requirement for requirement in every if plain(requirement.name) not in BESIDE]


def installed(name: str) -> str | None:
    """The version that is installed."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def with_their_needs(requirements: Iterable[Requirement], python: str) -> dict[str, str]:
    """The packages and all that they need in turn, each with the version that is installed here."""
    found: dict[str, str] = {}
    waiting = list(requirements)
    while waiting:
        name = plain(waiting.pop().name)
        version = installed(name)
        if name in found or name in BESIDE or name.startswith("nvidia-") or version is None:
            continue
        found[name] = version
        needs = [Requirement(line) for line in metadata.requires(name) or ()]
        waiting += [need for need in needs if applies(need, python)]
    return found


def trimmed(folder: Path, most: int = MOST) -> list[str]:
    """Remove the largest wheels until the rest is small enough; gives their names."""
    wheels = sorted(folder.glob("*.whl"), key=lambda wheel: wheel.stat().st_size)
    removed: list[str] = []
    while wheels and sum(wheel.stat().st_size for wheel in wheels) > most:
        removed.append(wheels.pop().name)
        (folder / removed[-1]).unlink()
    return removed


def pack(python: str, only: list[str]) -> int:
    """Download the wheels; 1 if some could not be had."""
    asked = [Requirement(name) for name in only] or wanted()
    for wheel in WHEELS.glob("*.whl"):
        wheel.unlink()
    failed = []
    for name, version in sorted(with_their_needs(asked, python).items()):
        command = [sys.executable, "-m", "pip", "download", "-q", "--disable-pip-version-check", "--no-deps"]
        command += ["--only-binary=:all:", "--implementation", "cp", "--python-version", python]
        command += [word for platform in PLATFORMS for word in ("--platform", platform)]
        if subprocess.run([*command, "-d", str(WHEELS), f"{name}=={version}"], check=False).returncode:
            failed.append(f"{name}=={version}")
    removed = trimmed(WHEELS)
    wheels = list(WHEELS.glob("*.whl"))
    size = sum(wheel.stat().st_size for wheel in wheels)
    print(f"{len(wheels)} wheels for Python {python}, {size / 2**20:.1f} MiB, in {WHEELS.relative_to(HOME)}")
    if removed:
        print(f"too large, so the machine must have them: {', '.join(removed)}")
    if failed:
        print(f"no wheel could be had of {', '.join(failed)}")
    return 1 if failed else 0


def missing(
    requirements: Iterable[Requirement],
    needs_of: Mapping[str, list[Requirement]],
    version_of: Callable[[str], str | None] = installed,
) -> list[str]:
    """The packages that are not installed or too old, and those among the wheels that such a one needs.

    Args:
        needs_of: what each package among the wheels needs.
    """
    found: list[str] = []
    waiting = list(requirements)
    while waiting:
        requirement = waiting.pop(0)
        name = plain(requirement.name)
        version = version_of(name)
        if name in found or name in BESIDE:
            continue
        if version is None or not requirement.specifier.contains(version, prereleases=True):
            found.append(name)
            waiting += needs_of.get(name, [])
    return found


def install() -> int:
    """Put what is missing into build/site; 1 if there is no wheel of something that crosstrace itself needs."""
    for name in BESIDE[:2]:
        if installed(name) is None:
            print(f"{name} is not installed for {sys.executable}; PYTHON=... names another Python", file=sys.stderr)
            return 1
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    wheels = {plain(wheel.name.partition("-")[0]): wheel for wheel in sorted(WHEELS.glob("*.whl"))}
    needs = {name: [need for need in _needs(wheel) if applies(need, python)] for name, wheel in wheels.items()}
    names = missing(wanted(), needs)
    chosen = [wheels[name] for name in names if name in wheels]
    if chosen:
        print(f"from {WHEELS.relative_to(HOME)} into {SITE.relative_to(HOME)}: {', '.join(w.name for w in chosen)}")
        command = [sys.executable, "-m", "pip", "install", "-q", "--disable-pip-version-check", "--no-index"]
        command += ["--no-deps", "--no-compile", "--no-cache-dir", "--target", str(SITE), *map(str, chosen)]
        if subprocess.run(command, check=False).returncode:
            return 1
    lacking = [name for name in names if name not in wheels]
    if lacking:
        print(f"missing, and not in benchmarks/wheels: {', '.join(lacking)}; what needs them will fail. Where there is "
              f"a network, benchmarks/gpu.sh --pack {python} makes that folder", file=sys.stderr)  # fmt: skip
    return 0


def _needs(wheel: Path) -> list[Requirement]:
    """What a wheel says that it needs."""
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        told = HeaderParser().parsestr(archive.read(name).decode())
    return [Requirement(line) for line in told.get_all("Requires-Dist") or ()]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    packing = commands.add_parser("pack", help="download the wheels")
    here = f"{sys.version_info.major}.{sys.version_info.minor}"
    packing.add_argument("python", nargs="?", default=here, help=f"their Python's version; {here} if not given")
    packing.add_argument("--only", nargs="+", default=[], metavar="NAME", help="these packages and what they need")
    commands.add_parser("install", help="install what is missing")
    options = parser.parse_args()
    return install() if options.command == "install" else pack(options.python, options.only)


if __name__ == "__main__":
    sys.exit(main())

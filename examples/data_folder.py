"""How a generator's output folder comes to be: all of it at once, or not at all.

    python -m examples.<example>.generate [--seed 0] [--out DIR] [--force]

Files are written into a temporary folder beside the target, the manifest last, and the folder is
then renamed. So a folder that has a manifest is complete, and a second call finds nothing to do.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

MANIFEST = "manifest.json"

Build = Callable[[Path, int], None]  # (folder, seed): writes every file of the example


class NotOurs(Exception):
    """The target holds files of somebody else's, which are not to be replaced."""


def main(example: str, build: Build, argv: Sequence[str] | None = None) -> int:
    """The command line of a generator. Exit code 2: the target is not a generator's folder."""
    parser = argparse.ArgumentParser(
        prog=f"python -m examples.{example}.generate", description=build.__doc__
    )
    parser.add_argument("--seed", type=_seed, default=0, help="changes model and data (default 0)")
    parser.add_argument(
        "--out", type=Path, default=Path("data") / example, help="default: %(default)s"
    )
    parser.add_argument("--force", action="store_true", help="write again what is there already")
    args = parser.parse_args(argv)
    started = time.perf_counter()
    try:
        written = ensure(args.out, example, build, args.seed, force=args.force)
    except NotOurs as error:
        parser.error(str(error))
    took = f"written in {time.perf_counter() - started:.1f} s" if written else "already there"
    print(f"{args.out}: seed {args.seed}, {took}")
    return 0


def ensure(out: Path, example: str, build: Build, seed: int, *, force: bool = False) -> bool:
    """Makes `out` hold what `build` writes for `seed`; False if it did so already."""
    wanted = {"example": example, "seed": seed, "source_sha256": _source_digest(example)}
    found, present = _read_manifest(out), _files(out)
    intact = {name: size for name, size in present.items() if name in found.get("files", {})}
    if not force and found == wanted | {"files": intact}:
        return False
    if strangers := sorted(present.keys() - intact.keys()) or (out.is_file() and [out.name]):
        raise NotOurs(
            f"--out {out}: holds {strangers[0]}, which no generator wrote and which would be lost; "
            "give another folder"
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as scratch:
        fresh = Path(scratch) / "fresh"
        fresh.mkdir()
        build(fresh, seed)
        manifest = json.dumps(wanted | {"files": _files(fresh)}, indent=2)
        (fresh / MANIFEST).write_text(manifest + "\n")
        if out.exists():
            out.rename(Path(scratch) / "replaced")
        fresh.rename(out)
    return True


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Rows with the same keys -> a Parquet file."""
    pq.write_table(pa.Table.from_pylist(list(rows)), path)


def _files(folder: Path) -> dict[str, int]:
    """Path -> size in bytes of every file, the manifest aside."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    sizes = {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}
    if _read_manifest(folder):
        del sizes[MANIFEST]
    return sizes


def _read_manifest(folder: Path) -> dict[str, Any]:
    """Empty where there is none, or one that no generator wrote."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
    except (OSError, ValueError):
        return {}
    return manifest if isinstance(manifest, dict) and "source_sha256" in manifest else {}


def _source_digest(example: str) -> str:
    """Changes with the generator's own code: data written by an older one is written anew."""
    here = Path(__file__).parent
    digest = hashlib.sha256()
    for source in sorted([*here.glob("*.py"), *(here / example).glob("*.py")]):
        digest.update(source.read_bytes())
    return digest.hexdigest()


def _seed(text: str) -> int:
    seed = int(text)
    if seed < 0:
        raise argparse.ArgumentTypeError(f"{seed} is negative; give 0 or more")
    return seed

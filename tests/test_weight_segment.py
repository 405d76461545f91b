"""A segment is read or written, never both; whoever dies or leaves stands in nobody's way."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from actors.weight_receiver import WeightReceiver, _Receiver
from actors.weight_segment import SegmentInUse, SegmentReader, WrittenSegment
from actors.weight_update import NeedsAll, Probe, WeightLayout, WeightUpdate


@pytest.fixture
def segment(tmp_path: Path) -> WrittenSegment:
    return WrittenSegment(str(tmp_path / "segment"), 4096, create=True)


def test_readers_see_what_was_written_without_mapping_it_again(segment: WrittenSegment) -> None:
    readers = [SegmentReader(), SegmentReader()]
    first = [reader.hold(segment.path) for reader in readers]
    for reader in readers:
        reader.release(segment.path)
    with segment.locked(wait_s=0):
        segment.data[:] = 7
    for reader, data in zip(readers, first, strict=True):
        assert reader.hold(segment.path) is data
        assert (data == 7).all()


def test_where_a_segment_is_not_the_weights_are_asked_for_in_full(tmp_path: Path) -> None:
    layout = WeightLayout.of([("w", (4,))], "float32")
    update = WeightUpdate(3, layout.id, (), Probe((1, 2), (3, 4)), str(tmp_path / "elsewhere"))
    receiver = _Receiver(WeightReceiver(), layout, None, shared=False, keeps_image=False)
    with pytest.raises(NeedsAll, match=r"version 3 lies in .*/elsewhere"):
        receiver.receive(update)


def test_a_reader_cannot_write(segment: WrittenSegment) -> None:
    data = SegmentReader().hold(segment.path)
    with pytest.raises(ValueError, match="read-only"):
        data[0] = 1


def test_it_is_not_written_before_the_last_reader_has_let_go(segment: WrittenSegment) -> None:
    readers = [SegmentReader(), SegmentReader()]
    for reader in readers:
        reader.hold(segment.path)
        reader.hold(segment.path)
    for reader in readers:
        with pytest.raises(SegmentInUse, match="a receiver still reads"), segment.locked(wait_s=0):
            pass
        reader.release(segment.path)
    with segment.locked(wait_s=0):
        pass


def test_it_is_not_read_while_it_is_written(segment: WrittenSegment) -> None:
    reader = SegmentReader()
    with segment.locked(wait_s=0), pytest.raises(SegmentInUse, match="being written"):
        reader.hold(segment.path)
    reader.hold(segment.path)


def _hold(path: str, held: str) -> None:
    SegmentReader().hold(path)
    Path(held).touch()
    time.sleep(60)


def test_a_reader_that_is_killed_holds_nothing(segment: WrittenSegment, tmp_path: Path) -> None:
    held = tmp_path / "held"
    reader = multiprocessing.get_context("spawn").Process(
        target=_hold, args=(segment.path, str(held))
    )
    reader.start()
    while not held.exists():
        assert reader.is_alive()
        time.sleep(0.01)
    with pytest.raises(SegmentInUse), segment.locked(wait_s=0):
        pass
    assert reader.pid is not None
    os.kill(reader.pid, signal.SIGKILL)
    with segment.locked(wait_s=10):
        pass
    reader.join()


def test_a_new_file_of_the_same_name_is_another_segment(segment: WrittenSegment) -> None:
    reader = SegmentReader()
    old = reader.hold(segment.path)
    segment.remove()
    again = WrittenSegment(segment.path, 8192, create=True)
    again.data[:] = 3
    assert len(reader.hold(segment.path)) == 8192
    assert (reader.hold(segment.path) == 3).all()
    assert (old == 0).all()  # it stays with who has it


def test_a_file_of_that_name_is_not_taken_over(segment: WrittenSegment) -> None:
    segment.data[:] = 7
    with pytest.raises(FileExistsError):
        WrittenSegment(segment.path, 4096, create=True)
    assert (SegmentReader().hold(segment.path) == 7).all()


HOLDS = """
import sys, time
from actors.segment_owner import SegmentOwner, segments_of
from actors.weight_segment import WrittenSegment
owner = SegmentOwner(sys.argv[1])
made = [WrittenSegment(path, 4096, create=True) for path in segments_of(sys.argv[1])]
print(flush=True)
time.sleep(60)
"""
SWEEPS = (
    "import sys; from actors.segment_owner import SegmentOwner; SegmentOwner(sys.argv[1]).close()"
)
ELSEWHERE = ["unshare", "--user", "--map-root-user", "--pid", "--fork"]


@pytest.mark.parametrize("sweeping", [[], ELSEWHERE], ids=["here", "in another container"])
def test_of_those_who_share_the_folder_only_the_dead_lose_their_segments(
    sweeping: list[str], tmp_path: Path
) -> None:
    """In a container of its own a process does not see the process ids of the others."""
    if sweeping and subprocess.run([*sweeping, "true"], capture_output=True, timeout=10).returncode:
        pytest.skip("no namespace for processes")
    stem = str(tmp_path / "raylign-5-a-run.0")
    sweep = [*sweeping, sys.executable, "-c", SWEEPS, str(tmp_path / "raylign-6-a-run.0")]
    (tmp_path / "raylign-7-nobody-s-0").touch()
    run = subprocess.Popen([sys.executable, "-c", HOLDS, stem], stdout=subprocess.PIPE)
    assert run.stdout is not None
    run.stdout.readline()
    subprocess.run(sweep, check=True, timeout=30)
    names = ["0", "1", "owner"]
    assert sorted(tmp_path.glob("raylign-5*")) == [Path(f"{stem}-{name}") for name in names]
    run.kill()
    run.wait(10)
    subprocess.run(sweep, check=True, timeout=30)
    assert [path.name for path in tmp_path.iterdir()] == ["raylign-7-nobody-s-0"]


def test_removing_leaves_no_file_and_what_was_mapped(segment: WrittenSegment) -> None:
    data = SegmentReader().hold(segment.path)
    segment.data[:] = 9
    segment.remove()
    segment.remove()
    assert not Path(segment.path).exists()
    assert np.array_equal(data, np.full(4096, 9, np.uint8))

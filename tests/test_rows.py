"""Files of rows that cannot be read are refused in one line."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from reward_service.rows import read_rows


@pytest.mark.parametrize(
    "line", ['{"prompt": ' + "[" * 200_000, '{"prompt": ' + "9" * 5000 + "}", '{"prompt": "a"']
)
def test_a_line_that_no_reader_takes_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "a"}\n' + line)
    with pytest.raises(ValueError, match=r"rows.jsonl: line 2 is not JSON .*; fix the line") as e:
        read_rows(path)
    assert "\n" not in str(e.value)


def test_a_parquet_file_with_bytes_that_are_no_text_is_named(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    texts = pa.StringArray.from_buffers(1, pa.py_buffer(b"\0\0\0\0\1\0\0\0"), pa.py_buffer(b"\xff"))
    pq.write_table(pa.table({"prompt": texts}), path)
    with pytest.raises(ValueError, match=r"rows.parquet: not a readable Parquet file"):
        read_rows(path)

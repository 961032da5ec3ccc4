"""Rows of parquet files."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from stare_megatron.data.tokenizer import first_line
from stare_megatron.errors import UserError

_BATCH = 1024  # rows in memory at a time


def read(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Rows with their number, from 1.

    Raises:
        UserError: not a parquet file, or one that cannot be read.
    """
    number = 0
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(_BATCH):
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
    except (pa.ArrowException, OSError) as e:
        raise UserError(f"{path}: not a readable parquet file: {first_line(e)}") from e
    except (ValueError, OverflowError) as e:  # bytes that are no UTF-8 text, a date beyond the year 9999
        raise UserError(f"{path}: a value after row {number} cannot be read: {first_line(e)}") from e

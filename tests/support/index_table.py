"""The index of a store as a table, with what follows from the table of shards."""

import numpy as np
import pyarrow as pa

from permafrost.store.columns import BOX_FIELDS, NUMBERS
from permafrost.store.index import RecordIndex
from permafrost.store.receipts import RECEIPT_SCHEMA


def index_table(index: RecordIndex) -> pa.Table:
    """Rows of the index, with the columns of a receipt and `array_row`."""
    every = range(index.num_rows)
    numbers = index.shard_numbers(every)
    shards, starts = index.shards.table, index.shards.starts
    row = np.arange(index.num_rows) - starts[numbers]
    places = np.array([index._manifest.place_in_generation(n) for n in range(len(index.shards))])
    columns = {
        "key": index.key_column(np.arange(index.num_rows)),
        "image_sha256": index.image_digests(),
        "split": shards["split"].take(numbers),
        "shard": shards["name"].take(numbers),
        "row": pa.array(row, pa.int32()),
        "array_row": pa.array(places[numbers] * index._manifest.rows_per_shard + row, pa.int64()),
        "labels": _lists(*index.label_lists(every)),
        "boxes": _boxes(*index.boxes(every)),
    }
    return pa.table(index.take(tuple(NUMBERS), every) | columns)


def _boxes(boxes: np.ndarray, lengths: np.ndarray) -> pa.Array:
    kind = RECEIPT_SCHEMA.field("boxes").type.value_type
    parts = [pa.array(boxes[:, n].astype(kind[n].type.to_pandas_dtype())) for n in range(5)]
    return _lists(pa.StructArray.from_arrays(parts, names=BOX_FIELDS), lengths)


def _lists(values: np.ndarray | pa.Array, lengths: np.ndarray) -> pa.Array:
    ends = np.append(0, np.cumsum(lengths)).astype(np.int32)
    return pa.ListArray.from_arrays(ends, pa.array(values))

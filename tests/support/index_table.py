"""The index of a store as a table, with what follows from the table of shards."""

import numpy as np
import pyarrow as pa

from permafrost.store.columns import BOX_FIELDS, NUMBERS
from permafrost.store.reader import Store
from permafrost.store.receipts import RECEIPT_SCHEMA


def index_table(store: Store) -> pa.Table:
    """Rows of the index, with the columns of a receipt and `array_row`."""
    index, shards, manifest = store.index, store.shards, store.manifest
    every = np.arange(index.num_rows)
    numbers = index.shard_numbers(every)
    places = np.array([manifest.place_in_generation(number) for number in range(len(shards))])
    row = every - shards.starts[numbers]
    columns = {
        "key": index.key_column(every),
        "image_sha256": index.image_digests(),
        "split": shards.table["split"].take(numbers),
        "shard": shards.table["name"].take(numbers),
        "row": row,
        "array_row": places[numbers] * manifest.rows_per_shard + row,
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

"""The index of a store as a table, with what follows from the table of shards."""

import numpy as np
import pyarrow as pa

from permafrost.store.columns import BOX_FIELDS, NUMBERS
from permafrost.store.reader import Store


def index_table(store: Store) -> pa.Table:
    """Rows of the index, with the columns of a commit marker and `array_row`."""
    index, shards, manifest = store.index, store.shards, store.manifest
    measured = index.take(tuple(NUMBERS), range(index.num_rows))  # before anything has a size
    every = np.arange(index.num_rows)
    numbers = index.shard_numbers(every)
    places = np.array([manifest.place_in_generation(number) for number in range(len(shards))])
    row = every - shards.starts[numbers]
    labels, boxes = (
        [part.tolist() for part in np.split(values, np.cumsum(lengths)[:-1])]
        for values, lengths in (index.label_lists(every), index.boxes(every))
    )
    columns = {
        "key": index.key_column(every),
        "image_sha256": index.image_digests(),
        "split": shards.table["split"].take(numbers),
        "shard": shards.table["name"].take(numbers),
        "row": row,
        "array_row": places[numbers] * manifest.rows_per_shard + row,
        "labels": labels,
        "boxes": [[dict(zip(BOX_FIELDS, box, strict=True)) for box in part] for part in boxes],
    }
    return pa.table(measured | columns)

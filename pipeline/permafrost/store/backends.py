"""Backends of teacher passes, by their name in `store.backend`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from permafrost.store.fields import WebDatasetFields
from permafrost.store.zarr_fields import ZarrFields

if TYPE_CHECKING:
    from permafrost.store.fields import PassFields


BACKENDS: dict[str, type[PassFields]] = {"zarr": ZarrFields, "webdataset": WebDatasetFields}

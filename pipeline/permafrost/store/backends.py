"""Backends of teacher passes, by their name in `store.backend`."""

from __future__ import annotations

from permafrost.store.fields import PassFields, WebDatasetFields
from permafrost.store.zarr_fields import ZarrFields

BACKENDS: dict[str, type[PassFields]] = {"zarr": ZarrFields, "webdataset": WebDatasetFields}

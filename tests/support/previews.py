"""Previews of data sets that a test writes."""

from __future__ import annotations

from permafrost.config.cluster import LocalClusterConfig
from permafrost.config.data import PreviewConfig, PreviewOptions
from tests.support.verbs import preview


def preview_of(data, executor="serial", **options):
    """Preview of data, made in this process or on Ray; of data and a store, against that store."""
    data, against = data if isinstance(data, tuple) else (data, None)
    config = PreviewConfig(
        data=data,
        preview=PreviewOptions(**options),
        cluster=LocalClusterConfig(),
        executor=executor,
        against=against,
    )
    return preview.run(config).preview


def levels_of(result):
    """Levels of the findings of a preview by their names."""
    return {finding.name: finding.level for finding in result.findings}


def message_of(result, name):
    """Message of the finding of a name, which must be the only one."""
    (finding,) = [finding for finding in result.findings if finding.name == name]
    return finding.message

"""Tables of `make bench`, from the figures that are committed in tests/benchmarks/."""

from __future__ import annotations

from tests.benchmarks import busy as bench_busy
from tests.benchmarks import fidelity as bench_fidelity
from tests.benchmarks import object_storage as bench_storage
from tests.benchmarks import precision_times as bench_precision
from tests.benchmarks import profiles as bench_profiles
from tests.benchmarks import scale as scale_figures
from tests.benchmarks.table import RESULTS, load, markdown, markdown_of_sides


def scale() -> str:
    """Costs with few records and with many, which `make bench ARGS=scale` measured."""
    return scale_figures.markdown(scale_figures.load(scale_figures.RESULTS))


def profiles() -> str:
    """Profiles of precompute, of a step and of the demo."""
    return bench_profiles.markdown(bench_profiles.load())


def busy() -> str:
    """Training of a small network next to other processes."""
    return bench_busy.markdown(bench_busy.load())


def precision_times() -> str:
    """Forward passes in several precisions and memory formats."""
    return bench_precision.markdown(bench_precision.load())


def object_storage() -> str:
    """Epochs that are read from a bucket behind a slow network."""
    return bench_storage.markdown(bench_storage.load())


def bench() -> str:
    """Ratios that `make bench` measured."""
    return markdown(load(RESULTS))


def bench_peers() -> str:
    """Speeds of other readers beside the store's, which `make bench` measured."""
    return markdown_of_sides(load(RESULTS))


def fidelity() -> str:
    """Agreement of passes in bfloat16 with float32, for six networks that are trained here."""
    return bench_fidelity.markdown(bench_fidelity.load())


TABLES = (scale, profiles, busy, precision_times, fidelity, object_storage, bench, bench_peers)

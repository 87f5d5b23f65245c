"""The lines that an estimate prints, and its values in JSON."""

from __future__ import annotations

from dataclasses import asdict
from math import isinf
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from permafrost.config.verbs import EstimateConfig
    from permafrost.estimation.break_even import BreakEven
    from permafrost.estimation.measurement import Estimate, Training, Work
    from permafrost.estimation.spread import Spread
    from permafrost.estimation.volume import Part

_UNITS = ("bytes", "kB", "MB", "GB", "TB", "PB")


def printed_lines(estimate: Estimate, config: EstimateConfig) -> dict[str, str]:
    """Return the values of an estimate by name. A range in parentheses is the lowest and the highest measurement."""
    lines = {
        "records": _records(estimate),
        "sample": f"{estimate.sample_shards} shards, {estimate.sample_records:,} records of "
        + (config.store.path if estimate.is_finished else f"data={config.data.kind}"),
        "bytes": f"{format_bytes(estimate.bytes)}, {_number(estimate.bytes / estimate.records)} a record"
        + (" (without the images, which stay in their tars)" if estimate.in_place else ""),
    }
    lines |= {f"bytes.{part.name}": _part(part) for part in estimate.parts}
    if estimate.other_forms:
        forms = [f"{option} {_number(size)}" for option, size in estimate.other_forms.items()]
        lines["other_options"] = f"{', '.join(forms)} bytes a record, before compression"
    cluster = config.cluster
    lines["worker"] = (
        f"one actor on {estimate.device}, cluster.threads_per_actor={cluster.threads_per_actor} "
        f"cluster.decode_threads={cluster.decode_threads}"
    )
    for name, work in (("packing", estimate.packing), ("annotation", estimate.annotation)):
        if work is not None:
            lines[name] = _work(work)
    if estimate.is_finished:
        lines["packing"] = f"not measured, as {config.store.path} is finished"
    if estimate.training is None:
        lines["students"] = f"not compared: {estimate.no_training}"
    else:
        lines |= _training(estimate.training, config)
    return lines


def plain_values(estimate: Estimate) -> dict[str, Any]:
    """Return the estimate as JSON values; null is an infinite number."""
    values: dict[str, Any] = _finite(asdict(estimate))
    return values


def format_bytes(count: float) -> str:
    """Format a number of bytes with a decimal unit and three digits."""
    unit = 0
    while count >= 999.5 and unit < len(_UNITS) - 1:
        count, unit = count / 1000, unit + 1
    return f"{_number(count)} {_UNITS[unit]}"


def _records(estimate: Estimate) -> str:
    scaled = " (estimate.records)" if estimate.is_scaled else ""
    finished = ", finished" if estimate.is_finished else ""
    return f"{estimate.records:,} in {estimate.shards:,} shards{scaled}{finished}"


def _part(part: Part) -> str:
    each = _number(part.bytes_per_record)
    low, high = _number(part.lowest), _number(part.highest)
    spread = "" if low == high else f" ({low} to {high})"
    return f"{format_bytes(part.bytes)}, {each}{spread} a record; {part.form}"


def _work(work: Work) -> str:
    each = _range(work.seconds_per_record.times(1e3))
    by_workers = ", ".join(
        f"{_duration(hours * 3600)} on {workers:,}" for workers, hours in work.hours.items()
    )
    whole = work.seconds
    low, high = _duration(whole.lowest), _duration(whole.highest)
    return (
        f"{each} ms a record; {_duration(whole.median)} ({low} to {high}) of one worker; "
        f"{by_workers} workers"
    )


def _training(training: Training, config: EstimateConfig) -> dict[str, str]:
    epochs = training.epochs
    return {
        "step_stored": f"{_range(training.stored.times(1e3))} ms a record; mode={config.mode} "
        f"method={config.method.kind} student={config.student.kind} {config.student.name}",
        "step_live": f"{_range(training.live.times(1e3))} ms a record; the same with mode=live",
        "cheaper_from": f"{_break_even(training.break_even_students)} students of trainer.epochs={epochs}, or "
        f"{_break_even(training.break_even_epochs)} epochs of {training.records:,} records",
    }


def _break_even(point: BreakEven) -> str:
    low, high = (_number(value) for value in (point.lowest, point.highest))
    return f"{_number(point.median)} ({low} to {high})"


def _range(spread: Spread) -> str:
    return f"{_number(spread.median)} ({_number(spread.lowest)} to {_number(spread.highest)})"


def _duration(seconds: float) -> str:
    """Format a duration in hours, or in a smaller unit if it is short."""
    if seconds < 120:
        return f"{_number(seconds)} s"
    return f"{_number(seconds / 60)} min" if seconds < 7200 else f"{_number(seconds / 3600)} h"


def _number(value: float) -> str:
    """Format a number with three digits, or with all digits before the point."""
    if isinf(value):
        return "never"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(name): _finite(member) for name, member in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(member) for member in value]
    return None if isinstance(value, float) and isinf(value) else value

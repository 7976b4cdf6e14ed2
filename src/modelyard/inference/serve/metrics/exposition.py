"""A snapshot of metrics as text: Prometheus 0.0.4, or OpenMetrics 1.0 for who asks for it.

    slabs → metrics.Reader → snapshot → here → the answer to GET /metrics

The formats: https://prometheus.io/docs/instrumenting/exposition_formats and https://prometheus.io/docs/specs/om/open_metrics_spec.
They differ in what a counter's family is called, in the unit, in how a bucket's bound is written, and in the last line.
"""

from collections.abc import Iterator, Sequence
from itertools import accumulate

from modelyard.inference.serve.metrics.metrics import (
    CounterFamily,
    Family,
    HistogramFamily,
    HistogramValue,
    Snapshot,
    label_names,
)

TEXT = b"text/plain; version=0.0.4; charset=utf-8"
OPENMETRICS = b"application/openmetrics-text; version=1.0.0; charset=utf-8"

_VALUE_ESCAPES = str.maketrans({"\\": r"\\", "\n": r"\n", '"': r"\""})
_HELP_ESCAPES = str.maketrans({"\\": r"\\", "\n": r"\n"})


def negotiate(accept: bytes) -> bytes:
    """Return the content type to answer a scraper's Accept header with: OpenMetrics where it is liked no less than plain text."""
    liked = {b"application/openmetrics-text": 0.0, b"text/plain": 0.0}
    for offer in accept.lower().split(b","):
        kind, *parameters = (part.strip() for part in offer.split(b";"))
        given = dict(parameter.partition(b"=")[::2] for parameter in parameters)
        spoken = kind != b"application/openmetrics-text" or given.get(b"version", b"1.0.0") in (b"0.0.1", b"1.0.0")
        if kind in liked and spoken:
            liked[kind] = max(liked[kind], _quality(given.get(b"q", b"1")))
    best = liked[b"application/openmetrics-text"]
    return OPENMETRICS if best > 0 and best >= liked[b"text/plain"] else TEXT


def expose(snapshot: Snapshot, content_type: bytes = TEXT) -> bytes:
    """Return `snapshot` in the format that `content_type`, TEXT or OPENMETRICS, names."""
    openmetrics = content_type == OPENMETRICS
    parts: list[str] = []
    for family, series in snapshot.items():
        parts += _openmetrics_head(family) if openmetrics else _text_head(family)
        names = label_names(family)
        if isinstance(family, HistogramFamily):
            ends = [repr(float(bound)) if openmetrics else _number(bound) for bound in family.bounds]
            tails = [f'le="{end}"}} %d\n' for end in (*ends, "+Inf")]
            for labels, value in series.items():
                assert isinstance(value, HistogramValue)
                parts.append(_histogram(family.name, _pairs(names, labels), tails, value))
        else:
            for labels, value in series.items():
                assert isinstance(value, float)
                pairs = _pairs(names, labels)
                parts.append(
                    f"{family.name}{{{pairs}}} {_number(value)}\n" if pairs else f"{family.name} {_number(value)}\n"
                )
    if openmetrics:
        parts.append("# EOF\n")
    return "".join(parts).encode()


def _text_head(family: Family) -> Iterator[str]:
    yield f"# HELP {family.name} {family.help.translate(_HELP_ESCAPES)}\n"
    yield f"# TYPE {family.name} {_kind(family)}\n"


def _openmetrics_head(family: Family) -> Iterator[str]:
    name, kind = family.name, _kind(family)
    if kind == "counter":
        # The family goes without the suffix that its samples must have; a name without it is no counter to this format.
        kind = "counter" if name.endswith("_total") else "unknown"
        name = name.removesuffix("_total")
    yield f"# TYPE {name} {kind}\n"
    if family.unit:
        yield f"# UNIT {name} {family.unit}\n"
    yield f"# HELP {name} {family.help.translate(_VALUE_ESCAPES)}\n"


def _kind(family: Family) -> str:
    return (
        "counter"
        if isinstance(family, CounterFamily)
        else "histogram"
        if isinstance(family, HistogramFamily)
        else "gauge"
    )


def _histogram(name: str, pairs: str, tails: Sequence[str], value: HistogramValue) -> str:
    """Return a histogram's lines; `tails` are its buckets' ends with a place for the number. Most of a page are these."""
    before = f"{name}_bucket{{{pairs}{',' if pairs else ''}".replace("%", "%%")
    counts = tuple(accumulate(value.counts))
    buckets = (before + before.join(tails)) % counts
    alone = f"{{{pairs}}}" if pairs else ""
    return f"{buckets}{name}_sum{alone} {_number(value.sum)}\n{name}_count{alone} {counts[-1]:.0f}\n"


def _pairs(names: Sequence[str], values: Sequence[str]) -> str:
    """Return label pairs without their braces; an empty value says the same as no label, so it is left out."""
    return ",".join(
        [f'{name}="{value.translate(_VALUE_ESCAPES)}"' for name, value in zip(names, values, strict=True) if value]
    )


def _number(value: float) -> str:
    if value != value:
        return "NaN"
    if value in (float("inf"), float("-inf")):
        return "+Inf" if value > 0 else "-Inf"
    return str(int(value)) if value.is_integer() and abs(value) < 1e15 else repr(value)


def _quality(text: bytes) -> float:
    try:
        return min(max(float(text), 0.0), 1.0)
    except ValueError:
        return 0.0

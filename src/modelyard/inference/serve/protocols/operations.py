"""What can be asked of a server whatever it serves: the operations that openapi.py describes beside those of each model.

One tuple per module with routes, so that a server describes the routes it has.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from modelyard.inference.serve.protocols.json_schema import COUNT, FLAG, TEXT, Json, array, obj


@dataclass(frozen=True)
class Operation:
    """A method on a path with {placeholders}. `answers` and `takes` are schemas; None for plain text, and for no body."""

    method: str
    path: str
    summary: str
    answers: Json | None = field(default_factory=dict)
    takes: Json | None = None
    may_be_empty: bool = False
    """Takes an empty body too."""
    may_be_unready: bool = False
    """Answers 503 with the same schema while what it asks about is not ready."""


_PLACES = ("", "/versions/{version}")
_ANYTHING: Json = {"type": "object"}
_PARAMETERS = obj({"parameters": _ANYTHING}, closed=True)
_TENSOR = obj(
    {"name": TEXT, "datatype": TEXT, "shape": array({"type": "integer", "minimum": -1})}, ["name", "datatype", "shape"]
)
_METADATA = obj(
    {"name": TEXT, "versions": array(TEXT), "platform": TEXT, "inputs": array(_TENSOR), "outputs": array(_TENSOR)},
    ["name", "platform", "inputs", "outputs"],
)
_READY = obj({"name": TEXT, "ready": FLAG, "error": TEXT}, ["name", "ready"])
_STATUS = obj(
    {
        "version": TEXT,
        "state": {"enum": ["START", "LOADING", "AVAILABLE", "UNLOADING", "END"]},
        "status": obj({"error_code": TEXT, "error_message": TEXT}),
    },
    ["version", "state"],
)
_MODEL = obj(
    {"name": TEXT, "ready": FLAG, "model_version_status": array(_STATUS)}, ["name", "ready", "model_version_status"]
)
_DURATION = obj({"count": COUNT, "ns": COUNT}, ["count", "ns"])
_STATISTICS = obj(
    {
        "model_stats": array(
            obj(
                {
                    "name": TEXT,
                    "version": TEXT,
                    "last_inference": COUNT | {"description": "Milliseconds since 1970."},
                    "inference_count": COUNT | {"description": "Rows."},
                    "execution_count": COUNT | {"description": "Batches."},
                    "inference_stats": {"type": "object", "additionalProperties": _DURATION},
                },
                ["name", "version", "inference_stats"],
            )
        )
    },
    ["model_stats"],
)
_VERBOSE = COUNT | {"maximum": 9, "description": "0 for no access log, 1 and more for a line per request."}
_LOG_SETTINGS = obj(
    {
        "log_verbose_level": _VERBOSE,
        "log_info": FLAG,
        "log_warning": FLAG,
        "log_error": FLAG,
        "log_file": TEXT,
        "log_format": TEXT,
    },
    closed=True,
)
_LEVEL: Json = array({"enum": ["TIMESTAMPS", "OFF"]}, least=1) | {"maxItems": 1}
_RATE: Json = TEXT | {"pattern": "^[1-9][0-9]{0,8}$", "description": "One request in so many."}
_TRACE_SETTINGS = obj(
    {
        "trace_level": _LEVEL,
        "trace_rate": _RATE,
        "trace_count": TEXT,
        "log_frequency": TEXT,
        "trace_file": TEXT,
        "trace_mode": TEXT,
    },
    closed=True,
)
_NULL: Json = {"type": "null", "description": "Back to where it was at the start."}
_TRACE_CHANGES = obj({"trace_level": {"anyOf": [_LEVEL, _NULL]}, "trace_rate": {"anyOf": [_RATE, _NULL]}}, closed=True)


def _at(
    places: Sequence[str], path: str, summary: str, answers: Json, *, may_be_unready: bool = False
) -> list[Operation]:
    """Return the operation GET on the path of a model, a version, a label; `path` has a {place}."""
    paths = [path.replace("{place}", place) for place in places]
    return [Operation("GET", one, summary, answers, may_be_unready=may_be_unready) for one in paths]


TENSORFLOW = (
    Operation("GET", "/v1/models", "The names of the models", obj({"models": array(TEXT)}, ["models"])),
    *_at((*_PLACES, "/labels/{label}"), "/v1/models/{model}{place}", "States of a model", _MODEL),
    *_at(
        (*_PLACES, "/labels/{label}"),
        "/v1/models/{model}{place}/metadata",
        "Its signature in TensorFlow's words",
        _ANYTHING,
    ),
)
"""Of tensorflow.py, beside predictions."""

OPEN_INFERENCE = (
    Operation(
        "GET",
        "/v2",
        "The server and what it speaks",
        obj({"name": TEXT, "version": TEXT, "extensions": array(TEXT)}, ["name"]),
    ),
    Operation("GET", "/v2/health/live", "Whether the process runs", obj({"live": FLAG}, ["live"])),
    Operation("GET", "/v2/health/ready", "Whether it can answer", obj({"ready": FLAG}, ["ready"]), may_be_unready=True),
    *_at(_PLACES, "/v2/models/{model}{place}", "Inputs and outputs of a model", _METADATA),
    *_at(_PLACES, "/v2/models/{model}{place}/ready", "Whether a model can answer", _READY, may_be_unready=True),
)
"""Of open_inference.py, beside inferences."""

STATISTICS = (
    Operation("GET", "/v2/models/stats", "Counts and times of all models", _STATISTICS),
    *_at(_PLACES, "/v2/models/{model}{place}/stats", "Counts and times of a model", _STATISTICS),
    *_at(_PLACES, "/v2/models/{model}{place}/config", "How a model is run", _ANYTHING),
    Operation("GET", "/v2/logging", "What is logged", _LOG_SETTINGS),
    Operation(
        "POST",
        "/v2/logging",
        "Change what is logged",
        _LOG_SETTINGS,
        takes=obj({"log_verbose_level": _VERBOSE}, closed=True),
    ),
    *_at(("", "/models/{model}"), "/v2{place}/trace/setting", "What is traced", _TRACE_SETTINGS),
    Operation("POST", "/v2/trace/setting", "Change what is traced", _TRACE_SETTINGS, takes=_TRACE_CHANGES),
    Operation(
        "POST", "/v2/models/{model}/trace/setting", "Change what is traced", _TRACE_SETTINGS, takes=_TRACE_CHANGES
    ),
)
"""Of statistics_api.py."""

_TRAFFIC_PATH = "/v2/repository/models/{model}/traffic"
REPOSITORY = (
    Operation(
        "POST",
        "/v2/repository/index",
        "All versions and their states",
        array(obj({"name": TEXT, "version": TEXT, "state": TEXT, "reason": TEXT}, ["name"])),
        takes=obj({"ready": FLAG}),
        may_be_empty=True,
    ),
    Operation(
        "POST", "/v2/repository/models/{model}/load", "Load a model", _ANYTHING, takes=_PARAMETERS, may_be_empty=True
    ),
    Operation(
        "POST", "/v2/repository/models/{model}/unload", "Unload it", _ANYTHING, takes=_PARAMETERS, may_be_empty=True
    ),
    Operation("GET", _TRAFFIC_PATH, "How requests are shared between versions", _ANYTHING),
    Operation("POST", _TRAFFIC_PATH, "Share requests between versions", _ANYTHING, takes=_ANYTHING),
)
"""Of repository_api.py."""

MONITORING = tuple(
    Operation("GET", path, "Metrics for Prometheus", None) for path in ("/metrics", "/monitoring/prometheus/metrics")
)
"""Of monitoring.py."""

OPENAPI = (
    Operation("GET", "/openapi.json", "This document", _ANYTHING),
    Operation("GET", "/v2/models/{model}/openapi.json", "What can be asked of a model, in OpenAPI", _ANYTHING),
)
"""Of openapi.py, which adds them itself."""

"""Triton's extensions over gRPC: the same commands and settings that statistics_api.py and repository_api.py offer over REST.

The messages mirror the JSON of the REST form, so each method returns that JSON as plain values, and open_inference_grpc.py makes
the message of it.
"""

import asyncio
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any

from modelyard.errors import ModelyardError, NotReady, RequestError, UnknownModel
from modelyard.inference.serve.metrics.metrics import Snapshot
from modelyard.inference.serve.models.repository import Broadcast, Entry, Json, Repository
from modelyard.inference.serve.protocols import repository_api, statistics_api
from modelyard.inference.serve.protocols.infer_message import parameters_of
from modelyard.inference.serve.protocols.statistics_api import LOG_COMMAND, TRACE_COMMAND, LogControl, TraceControl

Values = Json | Coroutine[Any, Any, Json]
Answer = Callable[[Any], Values]
"""A response as plain values, made of a request; or a coroutine that returns it."""

_LOG_FIELDS: Mapping[type, str] = {bool: "bool_param", int: "uint32_param", str: "string_param"}


class Extensions:
    """The extensions of one server. Belongs to the event loop."""

    def __init__(
        self,
        repository: Repository,
        snapshot: Callable[[], Snapshot],
        log: LogControl,
        trace: TraceControl,
        broadcast: Broadcast,
    ) -> None:
        """
        Args:
            snapshot: what all workers have counted; called on another thread.
            broadcast: has every worker, this one included, do a command.
        """
        self.names = (*statistics_api.EXTENSIONS, *trace.extensions, repository_api.EXTENSION)
        self._repository = repository
        self._snapshot = snapshot
        self._log = log
        self._trace = trace
        self._broadcast = broadcast

    def methods(self) -> Mapping[str, Answer]:
        """Return the methods by name."""
        return {
            "ModelConfig": self._config,
            "ModelStatistics": self._statistics,
            "RepositoryIndex": self._index,
            "RepositoryModelLoad": self._load,
            "RepositoryModelUnload": self._unload,
            "TraceSetting": self._trace_setting,
            "LogSettings": self._log_settings,
        }

    async def _config(self, request: Any) -> Json:
        loaded = await self._repository.ready_one(request.name, request.version or None)
        versions = [one.version for one in self._repository.entries(request.name) if one.loaded is not None]
        return {"config": statistics_api.model_config(loaded, versions)}

    async def _statistics(self, request: Any) -> Json:
        served = [
            (entry.name, str(entry.version))
            for entry in self._entries(request.name, request.version)
            if entry.loaded is not None or request.version
        ]
        return {"model_stats": statistics_api.model_statistics(await asyncio.to_thread(self._snapshot), served)}

    def _entries(self, name: str, version: str) -> Sequence[Entry]:
        repository = self._repository
        if not name:
            return [entry for each in repository.names() for entry in repository.entries(each)]
        return (repository.entry(name, version),) if version else repository.entries(name)

    def _index(self, request: Any) -> Json:
        _check_repository(request)
        return {"models": self._repository.index(only_ready=request.ready)}

    async def _load(self, request: Any) -> Json:
        return await self._done(request, repository_api.load_command)

    async def _unload(self, request: Any) -> Json:
        return await self._done(request, repository_api.unload_command)

    async def _done(self, request: Any, command: Callable[[str, Json], Json]) -> Json:
        _check_repository(request)
        answers = await self._broadcast(command(request.model_name, {"parameters": parameters_of(request.parameters)}))
        failure = repository_api.failure_of(answers)
        if failure is not None:
            raise _error(failure.message, failure.status)
        return {}

    async def _trace_setting(self, request: Any) -> Json:
        model = request.model_name or None
        if model is not None:
            self._repository.entries(model)  # there is such a model
        settings = self._trace.settings(model)
        if request.settings:
            changes = {
                name: _trace_value(setting.value, settings.get(name)) for name, setting in request.settings.items()
            }
            self._trace.check(changes, model)
            settings = await self._everywhere({"command": TRACE_COMMAND, "model": model, "changes": changes})
        return {
            "settings": {
                name: {"value": value if isinstance(value, list) else [value]} for name, value in settings.items()
            }
        }

    async def _log_settings(self, request: Any) -> Json:
        settings = self._log.settings()
        if request.settings:
            changes = parameters_of(request.settings)
            self._log.check(changes)
            settings = await self._everywhere({"command": LOG_COMMAND, "changes": changes})
        return {"settings": {name: {_LOG_FIELDS[type(value)]: value} for name, value in settings.items()}}

    async def _everywhere(self, command: Json) -> Json:
        """Have every worker obey and return the settings that hold now."""
        answers = await self._broadcast(command)
        failure = repository_api.failure_of(answers)
        if failure is not None:
            raise _error(f"{failure.message}; ask what holds now, then send the settings again", failure.status)
        return answers[0][1]


def _check_repository(request: Any) -> None:
    if request.repository_name:
        raise RequestError(
            f"there is one repository here, without a name; leave out repository_name {request.repository_name!r:.60}"
        )


def _trace_value(values: Sequence[str], present: Any) -> Any:
    """Return a setting as JSON has it: a list for those that are lists, null where nothing is given."""
    if not values:
        return None
    return list(values) if isinstance(present, list) or len(values) > 1 else values[0]


def _error(message: str, status: int) -> ModelyardError:
    """Return the error that says what a worker's answer said."""
    if status == 404:
        return UnknownModel(message)
    if status == 503:
        return NotReady(message)
    return RequestError(message) if status < 500 else ModelyardError(message)

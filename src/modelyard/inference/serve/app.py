"""Everything between the HTTP edge and the models: the protocols' routes in one table, and faults turned into answers."""

import asyncio
import sys
import traceback
from collections.abc import Callable, Coroutine, Iterable
from typing import Any

from modelyard.inference.serve.front import fault, is_explained
from modelyard.inference.serve.transport.messages import Request, Response
from modelyard.inference.serve.transport.routes import Route, Router


class App:
    """Answers every request: with what its route says, or with the error that explains why not."""

    def __init__(
        self, routes: Iterable[Route], *, on_refused: Callable[[Request, Exception], object] = lambda request, exc: None
    ) -> None:
        """`on_refused` is told of every request that is answered with an error here; those of the front tell for themselves."""
        self._router = Router(routes)
        self._on_refused = on_refused
        self._tasks: set[asyncio.Task[None]] = set()

    def __call__(self, request: Request) -> None:
        """Never raises."""
        try:
            answer, placeholders = self._router.find(request.head)
            response = answer(request, **placeholders)
            if response is None:
                return
            if isinstance(response, Response):
                request.reply(response)
                return
            task = asyncio.get_running_loop().create_task(self._finish(request, response))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
            request.on_gone = task.cancel
        except Exception as exc:  # noqa: BLE001  # the last place where a bug can become an answer
            self._fail(request, exc)

    async def _finish(self, request: Request, work: Coroutine[Any, Any, Response]) -> None:
        try:
            request.reply(await work)
        except Exception as exc:  # noqa: BLE001  # as above
            self._fail(request, exc)

    def _fail(self, request: Request, exc: Exception) -> None:
        if not is_explained(exc):
            text = "".join(traceback.format_exception(exc))
            request_id = request.request_id.decode("latin-1")
            sys.stderr.write(f"bug: {request.method} {request.path} (request {request_id}) failed:\n{text}")
        self._on_refused(request, exc)
        request.reply(fault(exc, request.request_id))

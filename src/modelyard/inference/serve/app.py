"""Everything between the HTTP edge and the models: the protocols' routes in one table, and faults turned into answers."""

import sys
import traceback
from collections.abc import Awaitable

from modelyard.errors import ModelyardError, NotReady
from modelyard.inference.serve import open_inference, predict
from modelyard.inference.serve.messages import Answer, Request, Response, error_response, json_response
from modelyard.inference.serve.repository import Repository
from modelyard.inference.serve.routes import Router


class App:
    """Answers every request: with what its route says, or with the error that explains why not."""

    def __init__(self, repository: Repository) -> None:
        self._router = Router([*open_inference.routes(repository), *predict.routes(repository)])

    def answer(self, request: Request) -> Answer:
        """Never raises."""
        try:
            answer = self._router.answer(request)
        except Exception as exc:  # noqa: BLE001  # the last place where a bug can become an answer
            return _fault(exc, request)
        return answer if isinstance(answer, Response) else _guarded(answer, request)


async def _guarded(answer: Awaitable[Response], request: Request) -> Response:
    try:
        return await answer
    except Exception as exc:  # noqa: BLE001  # as above
        return _fault(exc, request)


def _fault(exc: Exception, request: Request) -> Response:
    """Return the answer for a fault: the client's and not being ready are explained, a bug is logged and kept to ourselves."""
    if isinstance(exc, ModelyardError) and (exc.status < 500 or isinstance(exc, NotReady)):
        return error_response(exc)
    text = "".join(traceback.format_exception(exc))
    sys.stderr.write(f"bug: {request.method} {request.path} (request {request.request_id}) failed:\n{text}")
    return json_response({"error": f"internal error; see the server's log for request {request.request_id}"}, 500)

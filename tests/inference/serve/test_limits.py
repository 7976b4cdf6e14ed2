"""Limits of one request, over real sockets to a real server."""

import json
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any


def test_a_request_with_too_many_rows_is_413_and_says_what_to_do(store: Path, tmp_path: Path, serve: Any) -> None:
    config = tmp_path / "serve.toml"
    config.write_text("[models.tabular]\nmax_rows = 2\n")
    with serve(store, "--config", str(config)) as server:

        def ask(n_rows: int) -> tuple[int, Any]:
            body = json.dumps({"instances": [[0.0] * 30] * n_rows}).encode()
            request = urllib.request.Request(f"{server.url}/v1/models/tabular:predict", body)
            try:
                with urllib.request.urlopen(request) as answer:
                    return answer.status, json.loads(answer.read())
            except urllib.error.HTTPError as exc:
                return exc.code, json.loads(exc.read())

        assert ask(2)[0] == 200
        status, answer = ask(3)
        assert status == 413
        assert "at most 2 rows per request, got 3" in answer["error"]
        assert "max_rows" in answer["error"]

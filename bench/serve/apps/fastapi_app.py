"""FastAPI on uvicorn, as most people write it: a checked body, plain `def` endpoints, no batching."""

from typing import Annotated, Any

from fastapi import Body, FastAPI  # type: ignore[import-not-found, unused-ignore]  # in its own environment

from serve.apps.common import Runner, row, row_from_bytes

app = FastAPI()
runner = Runner()


def predict(inputs: Annotated[list[float], Body(embed=True)]) -> dict[str, Any]:
    return {"outputs": runner(row(inputs)[None])[0].tolist()}


def raw(data: Annotated[bytes, Body(media_type="application/octet-stream")]) -> dict[str, Any]:
    return {"outputs": runner(row_from_bytes(data)[None])[0].tolist()}


app.post("/predict")(predict)
app.post("/raw")(raw)

"""Ask a server with KServe's own inference clients, v2 and v1, and print what they make of its answers as JSON.

python ask_with_kserve.py URL   (a server with the model "late")
"""

import asyncio
import json
import sys

from kserve import InferenceRESTClient, InferInput, InferRequest
from kserve.inference_client import RESTConfig


async def main(url: str) -> None:
    v2 = InferenceRESTClient(RESTConfig(protocol="v2", timeout=30))
    told = {
        "live": await v2.is_server_live(url),
        "ready": await v2.is_server_ready(url),
        "model_ready": await v2.is_model_ready(url, "late"),
    }
    delay = InferInput("delay", [2], "FP32", data=[30.0, -12.0])
    origin = InferInput("origin", [2], "BYTES", data=["JFK", "LGA"])
    request = InferRequest(model_name="late", infer_inputs=[delay, origin], request_id="a1")
    answer = await v2.infer(url, request, model_name="late")
    told["v2"] = {output.name: output.data for output in answer.outputs}
    told["id"] = answer.id
    v1 = InferenceRESTClient(RESTConfig(protocol="v1", timeout=30))
    told["v1"] = (
        await v1.infer(
            url, {"instances": [{"delay": 30, "origin": "JFK"}, {"delay": -12, "origin": "LGA"}]}, model_name="late"
        )
    )["predictions"]
    print(json.dumps(told, default=str))


asyncio.run(main(sys.argv[1]))

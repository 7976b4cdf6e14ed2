"""Ask a server over TensorFlow Serving's REST protocol with ovmsclient and print what it makes of the answers as JSON.

python ask_with_ovmsclient.py HOST:PORT   (a server with the model "late")
"""

import json
import sys

import numpy as np
from ovmsclient import make_http_client

client = make_http_client(sys.argv[1])
answer = client.predict({"delay": np.array([30, -12], dtype=np.float32), "origin": ["JFK", "LGA"]}, "late")
told = {
    "status": {str(version): state["state"] for version, state in client.get_model_status("late").items()},
    "metadata": client.get_model_metadata("late"),
    "answer": {name: np.asarray(value).tolist() for name, value in answer.items()},
}
print(json.dumps(told, default=str))

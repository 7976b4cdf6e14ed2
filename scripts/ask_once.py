"""Serve a store with the given `modelyard` and ask every model its golden cases over HTTP; needs the bare install only.

python scripts/ask_once.py PATH/TO/modelyard STORE
"""

import json
import subprocess
import sys
import urllib.request

from modelyard.bundle.format import read_bundle
from modelyard.bundle.store import open_store
from modelyard.inference.rows import example_row, predictions


def main(modelyard: str, store_path: str) -> int:
    command = [modelyard, "serve", store_path, "--port", "0", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        ready = json.loads(server.stdout.readline())
        store = open_store(store_path)
        for model in ready["models"]:
            bundle = read_bundle(store.fetch(model["name"], model["version"]))
            cases = bundle.cases()
            rows = [
                example_row({name: array[i : i + 1] for name, array in cases.inputs.items()}, bundle.signature)
                for i in range(cases.n_samples)
            ]
            request = urllib.request.Request(
                f"{ready['url']}/v1/models/{model['name']}:predict", json.dumps({"instances": rows}).encode()
            )
            with urllib.request.urlopen(request) as response:
                answers = json.load(response)["predictions"]
            expected = predictions(cases.outputs, bundle.signature)
            same = len(answers) == len(expected) and all(map(alike, answers, expected))
            print(
                f"{model['name']}: {len(answers)} golden cases asked over HTTP, {'all alike' if same else 'ANSWERED WRONG'}"
            )
            if not same:
                return 1
        server.terminate()
    return 0


def alike(answer: object, expected: object) -> bool:
    if isinstance(expected, dict):
        return isinstance(answer, dict) and all(alike(answer.get(key), value) for key, value in expected.items())
    if isinstance(expected, float):
        return isinstance(answer, float) and abs(answer - expected) <= 1e-5 * (1 + abs(expected))
    return answer == expected


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2]))

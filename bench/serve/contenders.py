"""Who is measured: how each server is started, how it takes each workload, and its settings, tuned on a machine of two cores.

A peer is a module of `apps` in a virtual environment of its own. It gets its settings as environment variables: MODEL,
MODEL_PATH, PORT, GRPC_PORT, FOLDER, and those of `settings`. notes.md says what was tried.
"""

import os
import random
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path

from .places import HERE, HOME, LOGS, ROOT, STORES, VENVS
from .processes import TOLERANCE, Asking, Server, ServerFailed
from .workloads import MID, SLEEP, TINY, Workload

Settings = Mapping[str, Mapping[str, str | int]]


@dataclass(frozen=True)
class Contender:
    """A server and its settings.

    Attributes:
        command: what starts it; {python}, {bin}, {port}, {grpc_port}, {target_s}, {model}, {store} and {folder} are filled in.
        asking: how it takes a workload, by the workload's name; what is not here, it is not asked.
        venv: its folder under VENVS; empty for the project's own.
        settings: environment variables, by model; "*" for every model.
        grpc: perf_analyzer can drive it over gRPC.
        interrupt: ends by SIGINT, as its documentation has it.
        own_libpython: its binary embeds the system's libpython, which must be the virtual environment's.
    """

    name: str
    command: str
    asking: Mapping[str, Asking]
    venv: str = ""
    settings: Settings = field(default_factory=dict)
    grpc: bool = False
    interrupt: bool = False
    own_libpython: bool = False
    note: str = ""

    def start(self, workload: Workload) -> "Running":
        """Start a fresh server of the workload's model."""
        model = workload.model
        port = _free_ports()
        bin_folder = VENVS / self.venv / "bin" if self.venv else Path(sys.prefix) / "bin"
        folder = HOME / f"{self.name}-{model.name}"
        command = self.command.format(
            python=bin_folder / "python",
            bin=bin_folder,
            port=port,
            grpc_port=port + 1,
            target_s=workload.target_s,
            model=model.name,
            store=STORES / model.name,
            folder=folder,
        )
        settings = {**self.settings.get("*", {}), **self.settings.get(model.name, {})}
        env = {
            "MODEL": model.name,
            "MODEL_PATH": str(model.path),
            "PORT": str(port),
            "GRPC_PORT": str(port + 1),
            "FOLDER": str(folder),
            "PATH": f"{bin_folder}:{os.environ['PATH']}",
            "PYTHONPATH": ":".join([str(HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])]),
            **{name: str(value) for name, value in settings.items()},
        }
        if self.own_libpython:
            env["LD_LIBRARY_PATH"] = str((bin_folder / "python").resolve().parent.parent / "lib")
        log = LOGS / f"{self.name}-{workload.name}.log".replace(", ", "-").replace(" ", "-")
        server = Server(command.split(), env, ROOT, log, port, self.asking[workload.name], workload)
        return Running(self, server, port + 1)

    def serving(self, store: Path) -> "Contender":
        """Return it serving everything in `store` rather than the workload's model alone."""
        return replace(self, command=self.command.replace("{store}", str(store)))

    def with_arguments(self, *arguments: str) -> "Contender":
        return replace(self, command=" ".join([self.command, *arguments]))


@dataclass(frozen=True)
class Running:
    """A started contender, to be used as a context manager."""

    contender: Contender
    server: Server
    grpc_port: int

    @property
    def name(self) -> str:
        return self.contender.name

    def check_grpc(self) -> None:
        """Ask for a row over gRPC with Triton's client; raises ServerFailed where the answer is wrong."""
        try:
            from tritonclient import grpc
        except ImportError as error:
            raise ServerFailed(f"cannot check answers over gRPC ({error}); install tritonclient[grpc]") from error
        model = self.server.workload.model
        tensor = grpc.InferInput(model.input, [1, *model.shape], "FP32")
        tensor.set_data_from_numpy(self.server.x[:1])
        with closing(grpc.InferenceServerClient(f"127.0.0.1:{self.grpc_port}")) as client:
            answer = client.infer(model.name, [tensor], client_timeout=10).as_numpy(model.output)
        if abs(answer - self.server.y[:1]).max() > TOLERANCE:
            raise ServerFailed(f"a wrong answer over gRPC: {answer}")

    def __enter__(self) -> "Running":
        return self

    def __exit__(self, *_: object) -> None:
        self.server.stop(signal.SIGINT if self.contender.interrupt else signal.SIGTERM)


_PREDICT = "/v1/models/{model}:predict"
_INFER = "/v2/models/{model}/infer"

OURS = Contender(
    "modelyard",
    "{python} -m modelyard serve {store} --port {port}",
    {
        "tiny-json": Asking("json", _PREDICT),
        "tiny-binary": Asking("oip-binary", _INFER),
        "mid": Asking("oip-binary", _INFER),
        "small-json": Asking("json", _PREDICT),
    },
)


def ours(*arguments: str, n_workers: int | None = None) -> Contender:
    """Return our server, aiming at the workload's target, with `arguments` added to its command line.

    The options are those that this version of it has.
    """
    help_text = subprocess.run(
        [sys.executable, "-m", "modelyard", "serve", "--help"], capture_output=True, text=True, check=True
    ).stdout
    options = {"--target": "{target_s}", "--grpc-port": "{grpc_port}"}
    if n_workers is not None:  # else as many as it finds right for the model
        options["--workers"] = str(n_workers)
    known = [word for name, value in options.items() if f"{name} " in help_text for word in (name, value)]
    return replace(OURS.with_arguments(*known, *arguments), grpc="--grpc-port" in known)


def without_target(contender: Contender) -> Contender:
    """Return our server with its default target, under a name of its own: what a closed loop asks does not care when it is out."""
    command = contender.command.replace(" --target {target_s}", "")
    return replace(contender, name=f"{contender.name}, no target", command=command)


def sleeping(n_instances: int) -> Contender:
    """Return our server with an engine that sleeps and costs no CPU."""
    return Contender(
        "modelyard, sleeping engine",
        f"{{python}} -m serve.synthetic_server --store {{store}} --port {{port}} --target {{target_s}} --instances {n_instances}",
        {name: Asking("oip-binary", _INFER) for name in ("sleep-1", "sleep-16")},
    )


# A tiny model gains from larger batches than one of milliseconds.
_BATCHES: Settings = {"tiny": {"MAX_BATCH": 32, "WAIT_MS": 1}, "mid": {"MAX_BATCH": 4, "WAIT_MS": 1}}
_TWO_WORKERS: Settings = {**_BATCHES, "*": {"WORKERS": 2}}


def _mosec(max_batch_size: int) -> Contender:
    return Contender(
        f"mosec-b{max_batch_size}",
        "{python} -m serve.apps.mosec_app --address 127.0.0.1 --port {port} --log-level warning",
        {"tiny-json": Asking("json", "/inference"), "mid": Asking("raw", "/inference")},
        venv="mosec",
        settings={"*": {"WORKERS": 2, "WAIT_MS": 1, "MAX_BATCH": max_batch_size}},
        note="2 workers; waits at least 1 ms for a batch to fill, the least it can",
    )


def _bare(n_processes: int) -> Contender:
    return Contender(
        f"bare-uvloop-{n_processes}p",
        "{python} -m serve.apps.bare_app",
        {"tiny-json": Asking("json", "/predict"), "tiny-binary": Asking("oip-binary", _INFER)},
        settings={"*": {"WORKERS": n_processes, "MAX_BATCH": 32}},
        note="a ceiling, no product: uvloop, httptools and orjson, without checks, limits or metrics",
    )


def _bentoml(name: str, batchable: int, note: str) -> Contender:
    return Contender(
        name,
        "{bin}/bentoml serve serve.apps.bentoml_app:Service --port {port} --host 127.0.0.1 -q",
        {"tiny-json": Asking("json-list", "/predict"), "mid": Asking("json-b64-list", "/b64")},
        venv="bentoml",
        settings={**_BATCHES, "*": {"WORKERS": 2, "BENTOML_DO_NOT_TRACK": "True", "BATCHABLE": batchable}},
        note=note,
    )


def _mlserver(name: str, settings: Settings, note: str) -> Contender:
    return Contender(
        name,
        "{python} -m serve.apps.mlserver_app",
        {"tiny-json": Asking("oip-json", _INFER), "mid": Asking("oip-b64", _INFER)},
        venv="mlserver",
        settings=settings,
        note=note,
    )


def _ray(name: str, switches: Mapping[str, str | int], note: str) -> Contender:
    return Contender(
        name,
        "{python} -m serve.apps.ray_app",
        {"tiny-json": Asking("json", "/predict"), "mid": Asking("raw", "/raw")},
        venv="ray",
        settings={**_BATCHES, "*": {"WORKERS": 2, "RAY_USAGE_STATS_ENABLED": "0", **switches}},
        note=note,
    )


MOSEC = tuple(_mosec(size) for size in (1, 8, 16))
MOSEC_MID = _mosec(4)
TRITON = Contender(
    "triton",
    "{python} -m serve.apps.triton_app",
    {"tiny-binary": Asking("oip-binary", _INFER), "mid": Asking("oip-binary", _INFER)},
    venv="pytriton",
    settings={
        "*": {"WORKERS": 2},
        **{model: {**batch, "WAIT_MS": 0} for model, batch in _BATCHES.items()},
    },
    grpc=True,
    own_libpython=True,
    note="the tritonserver of the nvidia-pytriton wheel with its python backend, 2 instances, no queue delay (its default)",
)
FASTAPI = Contender(
    "fastapi-2w",
    "{bin}/uvicorn serve.apps.fastapi_app:app --host 127.0.0.1 --port {port} --workers 2 --log-level warning --no-access-log",
    {"tiny-json": Asking("json", "/predict"), "mid": Asking("raw", "/raw")},
    venv="fastapi",
    note="as most people write it: 2 workers, 1 thread each, no batching",
)
BARE = (_bare(1), _bare(2))
OTHERS = (
    Contender(
        "pytriton",
        "{python} -m serve.apps.pytriton_app",
        {"tiny-binary": Asking("oip-binary", _INFER), "mid": Asking("oip-binary", _INFER)},
        venv="pytriton",
        settings=_TWO_WORKERS,
        interrupt=True,
        own_libpython=True,
        note="the same binary behind PyTriton's own proxy, 2 instances",
    ),
    Contender(
        "litserve",
        "{python} -m serve.apps.litserve_app",
        {"tiny-json": Asking("json", "/predict"), "mid": Asking("json-b64", "/predict")},
        venv="litserve",
        settings={
            "tiny": {**_BATCHES["tiny"], "WORKERS": 1, "API_SERVERS": 2},
            "mid": {**_BATCHES["mid"], "WORKERS": 2, "API_SERVERS": 1},
        },
    ),
    _bentoml("bentoml", 1, "2 workers, adaptive batching"),
    _bentoml("bentoml-nobatch", 0, "2 workers, batchable=False"),
    _mlserver(
        "mlserver",
        {"tiny": {**_BATCHES["tiny"], "WORKERS": 0}, "mid": {**_BATCHES["mid"], "WORKERS": 2}},
        "adaptive batching; parallel workers for mid only, since they cost tiny throughput",
    ),
    _mlserver(
        "mlserver-nobatch",
        {"*": {"MAX_BATCH": 0, "WAIT_MS": 0}, "tiny": {"WORKERS": 0}, "mid": {"WORKERS": 2}},
        "its default: adaptive batching off",
    ),
    Contender(
        "kserve",
        "{python} -m serve.apps.kserve_app",
        {"tiny-json": Asking("oip-json", _INFER), "mid": Asking("oip-binary", _INFER)},
        venv="kserve",
        settings={"*": {"WORKERS": 2}},
        note="2 workers; it has no batcher of its own",
    ),
    _ray("rayserve", {}, "its default Python proxy"),
    _ray(
        "rayserve-haproxy",
        {"RAY_SERVE_THROUGHPUT_OPTIMIZED": "1", "RAY_SERVE_ENABLE_HA_PROXY": "1"},
        "the documented switches for high throughput",
    ),
)
CONTENDERS = {contender.name: contender for contender in (*MOSEC, MOSEC_MID, TRITON, FASTAPI, *BARE, *OTHERS)}


def _free_ports() -> int:
    """Return a port that is free, as is the one after it.

    From below the range of outgoing connections, and at random, so that two runs on one machine do not meet.
    """
    while True:
        port = random.randrange(10_000, 32_000, 2)
        try:
            for each in (port, port + 1):
                with socket.create_server(("127.0.0.1", each)):
                    pass
        except OSError:
            continue
        return port


def publish(model_file: Path, name: str, store: Path) -> None:
    """Import an ONNX file into `store` as its first version, by the command that people use, where it is not there yet."""
    if (store / name / "1").exists():
        return
    command = [sys.executable, "-m", "modelyard", "import", str(model_file), "--name", name, "--store", str(store)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def publish_all() -> None:
    """Put each served model into a store of its own."""
    for model in (TINY, MID, SLEEP):
        publish(model.path, model.name, STORES / model.name)

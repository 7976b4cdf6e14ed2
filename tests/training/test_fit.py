"""The training loop keeps the best weights, and a run that was killed ends with the weights of one that was not."""

import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from safetensors import safe_open  # noqa: E402  # after torch, which is optional
from torch import Tensor, nn  # noqa: E402
from torch.optim.optimizer import register_optimizer_step_pre_hook  # noqa: E402

from modelyard.clock import ManualClock  # noqa: E402
from modelyard.errors import ConfigError, TrainingError  # noqa: E402
from modelyard.metering import Meter  # noqa: E402
from modelyard.prices import load_prices  # noqa: E402
from modelyard.schema import convert  # noqa: E402
from modelyard.training.fit import FitProgress, FitResult, Rows, fit, shifted  # noqa: E402
from modelyard.training.fit_config import FitConfig  # noqa: E402
from modelyard.training.networks import ImageNetwork, Rescaled, TableNetwork  # noqa: E402

Weights = dict[str, Tensor]
ALWAYS_S = 1e-9
"""A checkpoint after every batch."""


class Killed(Exception):
    """Stands for whatever ends a run midway."""


def _images(n: int = 48, seed: int = 0) -> Rows:
    """Bright squares on the left or on the right."""
    generator = np.random.default_rng(seed)
    pixels = generator.integers(0, 100, size=(n, 8, 8, 1), dtype=np.uint8)
    label = np.arange(n) % 2
    pixels[label == 0, 2:6, :4] += 100
    pixels[label == 1, 2:6, 4:] += 100
    return Rows(torch.from_numpy(pixels), torch.from_numpy(label))


def _image_network() -> ImageNetwork:
    """Dropout and batch norm included."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return ImageNetwork(torch.tensor([0.3]), torch.tensor([0.2]), (4, 6), 2, dropout=0.3)


def _table(n: int = 400, seed: int = 0, noise: float = 0.3) -> Rows:
    generator = np.random.default_rng(seed)
    x = generator.normal(size=(n, 5)).astype(np.float32)
    y = (x[:, 0] * x[:, 1] + noise * generator.normal(size=n) > 0).astype(np.int64)
    return Rows(torch.from_numpy(x), torch.from_numpy(y))


def _table_network(n_outputs: int = 2) -> TableNetwork:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return TableNetwork(5, (16,), n_outputs, dropout=0.1)


def _fit(module: nn.Module, train: Rows, validation: Rows, **settings: Any) -> FitResult:
    loop = {name: settings.pop(name) for name in ("checkpoint", "run_key", "progress") if name in settings}
    config = FitConfig(**({"epochs": 4, "batch_size": 16, "n_threads": 1} | settings))
    return fit(module, train, validation, config, meter=Meter(load_prices(), ManualClock()), **loop)


def _weights(module: nn.Module) -> Weights:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def _same(one: Weights, other: Weights) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def _fit_images(checkpoint: Path | None = None, **more: Any) -> tuple[Weights, FitResult]:
    module = _image_network()
    result = _fit(module, _images(), _images(16, seed=1), shift_pixels=1, checkpoint=checkpoint, run_key="run", **more)
    return _weights(module), result


@dataclass
class KillAt:
    """Raises at a place of the run; the callback hears of every batch because the clock it looks at is the machine's."""

    epoch: int
    batch: int

    def __call__(self, progress: FitProgress) -> None:
        if (progress.epoch, progress.batch) >= (self.epoch, self.batch):
            raise Killed


@pytest.fixture
def every_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the progress callback be called after every batch."""
    monkeypatch.setattr("modelyard.training.fit.PROGRESS_EVERY_S", 0.0)


def test_the_same_seed_gives_the_same_weights_and_another_seed_others() -> None:
    first, _ = _fit_images(seed=3)
    torch.rand(7)  # what happened to the global generator does not matter
    again, _ = _fit_images(seed=3)
    other, _ = _fit_images(seed=4)
    assert _same(first, again)
    assert not _same(first, other)


def test_the_loop_learns_and_leaves_the_global_generator_and_threads_alone() -> None:
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    module = _table_network()
    result = _fit(module, _table(2000), _table(500, seed=1), epochs=15, batch_size=64, learning_rate=1e-2)
    assert result.best_score > 0.8
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.get_rng_state(), state)
    assert not module.training


def test_early_stopping_keeps_the_weights_with_the_lowest_validation_loss() -> None:
    """Labels at random: the loss on other rows only rises once the network remembers the training rows."""
    train, validation = _table(200, noise=100.0), _table(200, seed=1, noise=100.0)
    module = _table_network()
    result = _fit(module, train, validation, epochs=60, patience=3, learning_rate=2e-2)
    assert result.stopped_early
    assert result.epochs_run < 60
    with torch.no_grad():
        logits = module(validation.x)
        loss = float(nn.functional.cross_entropy(logits, validation.y))
        accuracy = float((logits.argmax(1) == validation.y).double().mean())
    assert loss == pytest.approx(result.best_loss, rel=1e-5)
    assert accuracy == pytest.approx(result.best_score)


def test_a_longer_run_never_ends_with_a_worse_validation_loss_than_its_best_epoch() -> None:
    """The first epochs of one schedule are the same whether the run is allowed to go on or not."""
    train, validation = _table(200, noise=100.0), _table(200, seed=1, noise=100.0)
    impatient = _fit(_table_network(), train, validation, epochs=40, patience=1, learning_rate=2e-2)
    patient = _fit(_table_network(), train, validation, epochs=40, patience=40, learning_rate=2e-2)
    assert patient.best_loss <= impatient.best_loss
    assert not patient.stopped_early


def test_gradients_never_exceed_the_norm_they_are_clipped_to() -> None:
    norms: list[float] = []

    def record(optimizer: Any, args: Any, kwargs: Any) -> None:
        gradients = [p.grad.norm() for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        norms.append(float(torch.stack(gradients).norm()))

    handle = register_optimizer_step_pre_hook(record)
    try:
        _fit(_table_network(), _table(64), _table(32, seed=1), epochs=1, clip_norm=1e6)
        loose = list(norms)
        norms.clear()
        _fit(_table_network(), _table(64), _table(32, seed=1), epochs=1, clip_norm=1e-2)
    finally:
        handle.remove()
    assert min(loose) > 1e-2
    assert norms
    assert max(norms) <= 1e-2 * (1 + 1e-4)


def test_a_loss_that_is_not_a_number_names_the_learning_rate() -> None:
    rows = _table(64)
    rows.x[5, 2] = float("inf")
    with pytest.raises(
        TrainingError, match=r"the loss is nan in epoch 1, batch 4; lower fit.learning_rate \(it is 0.5\)"
    ):
        _fit(_table_network(), rows, _table(32), learning_rate=0.5)


def test_a_validation_loss_that_is_not_a_number_names_the_learning_rate() -> None:
    validation = _table(64)
    validation.x[5, 2] = float("nan")
    with pytest.raises(TrainingError, match=r"validation loss is nan after epoch 1; lower fit.learning_rate"):
        _fit(_table_network(), _table(64), validation)


@pytest.mark.parametrize("unit", [1e-5, 1.0, 1e6])
def test_a_regression_is_learned_in_whatever_unit_its_label_is(unit: float) -> None:
    rows = [_table(n, seed=seed) for n, seed in ((2000, 0), (500, 1))]
    train, validation = (Rows(r.x, (3 * unit + unit * r.x[:, 0] * r.x[:, 1]).to(torch.float32)) for r in rows)
    module = Rescaled(_table_network(1), train.y.mean(), train.y.std())
    result = _fit(module, train, validation, epochs=20, batch_size=64, learning_rate=1e-2)
    assert result.best_score < 0.5 * float(validation.y.std())


def test_a_single_row_is_left_for_no_batch() -> None:
    """Batch norm over one row has no deviation: 33 rows in batches of 16 make two batches."""

    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
            self.sizes: list[int] = []

        def forward(self, x: Tensor) -> Tensor:
            if self.training:
                self.sizes.append(len(x))
            out: Tensor = self.layers(x)
            return out

    module = Normed()
    _fit(module, _table(33), _table(10), epochs=1)
    assert module.sizes == [16, 17]


def test_shifting_moves_whole_images_and_fills_with_zeros() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        image = torch.zeros((200, 7, 7, 1), dtype=torch.uint8)
        image[:, 3, 3] = 255
        moved = shifted(image, 2)
    assert moved.shape == image.shape
    assert moved.dtype == torch.uint8
    places = {tuple(place) for place in (moved[..., 0] == 255).nonzero()[:, 1:].tolist()}
    assert places == {(row, column) for row in range(1, 6) for column in range(1, 6)}
    assert (moved.sum(dim=(1, 2, 3)) == 255).all()


@pytest.mark.usefixtures("every_batch")
@pytest.mark.parametrize(("epoch", "batch"), [(1, 1), (1, 3), (2, 2), (3, 3), (4, 3)])
@pytest.mark.parametrize("every_s", [ALWAYS_S, 0.02])
def test_a_run_that_was_interrupted_ends_with_the_same_weights(
    tmp_path: Path, epoch: int, batch: int, every_s: float
) -> None:
    """Mid epoch, at an epoch's end, at the very end; with a checkpoint of the last batch, or one further back."""
    whole, expected = _fit_images(None)
    checkpoint = tmp_path / "run.safetensors"
    with pytest.raises(Killed):
        _fit_images(checkpoint, checkpoint_every_s=every_s, progress=KillAt(epoch, batch))
    resumed, result = _fit_images(checkpoint, checkpoint_every_s=every_s)
    assert _same(whole, resumed)
    assert (result.best_loss, result.best_score) == (expected.best_loss, expected.best_score)
    if every_s == ALWAYS_S and (epoch, batch) > (1, 1):
        assert result.resumed_at is not None
        assert result.spent_before is not None


@pytest.mark.usefixtures("every_batch")
def test_a_run_interrupted_after_its_best_epoch_still_knows_it(tmp_path: Path) -> None:
    """Labels at random: the best epoch is an early one, and the run stops some epochs after it."""
    train, validation = _table(200, noise=100.0), _table(200, seed=1, noise=100.0)

    def run(checkpoint: Path | None, **more: Any) -> tuple[Weights, FitResult]:
        module = _table_network()
        patient: dict[str, Any] = {"epochs": 60, "patience": 4, "learning_rate": 2e-2, "checkpoint": checkpoint}
        result = _fit(module, train, validation, checkpoint_every_s=ALWAYS_S, **patient, **more)
        return _weights(module), result

    whole, expected = run(None)
    assert expected.stopped_early
    checkpoint = tmp_path / "run.safetensors"
    with pytest.raises(Killed):
        run(checkpoint, progress=KillAt(expected.epochs_run, 3))
    resumed, result = run(checkpoint)
    assert result.resumed_at == (expected.epochs_run - 1, 2)
    assert _same(whole, resumed)
    assert (result.epochs_run, result.best_loss) == (expected.epochs_run, expected.best_loss)


@pytest.mark.usefixtures("every_batch")
def test_a_run_may_be_interrupted_many_times(tmp_path: Path) -> None:
    whole, _ = _fit_images(None)
    checkpoint = tmp_path / "run.safetensors"
    for epoch, batch in [(1, 2), (1, 3), (2, 2), (4, 1)]:
        with pytest.raises(Killed):
            _fit_images(checkpoint, checkpoint_every_s=ALWAYS_S, progress=KillAt(epoch, batch))
    resumed, result = _fit_images(checkpoint, checkpoint_every_s=ALWAYS_S)
    assert _same(whole, resumed)
    assert result.resumed_at is not None
    assert result.resumed_at[0] == 2  # the batch that was being told of was not saved yet


def test_a_finished_run_is_not_trained_again(tmp_path: Path) -> None:
    checkpoint = tmp_path / "run.safetensors"
    whole, first = _fit_images(checkpoint, checkpoint_every_s=ALWAYS_S)
    calls: list[FitProgress] = []
    again, result = _fit_images(checkpoint, checkpoint_every_s=ALWAYS_S, progress=calls.append)
    assert _same(whole, again)
    assert calls == []
    assert (result.epochs_run, result.best_loss) == (first.epochs_run, first.best_loss)


def test_a_checkpoint_of_another_run_is_not_taken_up(tmp_path: Path) -> None:
    checkpoint = tmp_path / "run.safetensors"
    _fit_images(checkpoint, checkpoint_every_s=ALWAYS_S)
    module = _image_network()
    result = _fit(module, _images(), _images(16, seed=1), shift_pixels=1, checkpoint=checkpoint, run_key="another")
    assert result.resumed_at is None
    assert _same(_weights(module), _fit_images(None)[0])


@pytest.mark.parametrize("damage", ["truncated", "garbage", "empty"])
def test_a_damaged_checkpoint_is_named_with_the_remedy(tmp_path: Path, damage: str) -> None:
    checkpoint = tmp_path / "run.safetensors"
    _fit_images(checkpoint, checkpoint_every_s=ALWAYS_S)
    whole = checkpoint.read_bytes()
    checkpoint.write_bytes({"truncated": whole[: len(whole) // 2], "garbage": b"\x80\x04pickle?", "empty": b""}[damage])
    with pytest.raises(TrainingError, match=r"run\.safetensors: not a checkpoint of ours .*; remove it to start anew"):
        _fit_images(checkpoint)


def test_a_checkpoint_of_another_module_is_named_with_the_remedy(tmp_path: Path) -> None:
    checkpoint = tmp_path / "run.safetensors"
    _fit_images(checkpoint, checkpoint_every_s=ALWAYS_S)
    with pytest.raises(TrainingError, match=r"its tensors are not those of this module; remove it to start anew"):
        _fit(_table_network(), _table(), _table(), checkpoint=checkpoint, run_key="run")


def test_a_checkpoint_is_a_plain_safetensors_file_and_the_only_one_left(tmp_path: Path) -> None:
    checkpoint = tmp_path / "deep" / "run.safetensors"
    _fit_images(checkpoint, checkpoint_every_s=ALWAYS_S)
    with safe_open(checkpoint, framework="numpy") as file:
        names = list(file.keys())
    assert {name.partition(".")[0] for name in names} == {"model", "best", "optimizer"}
    assert [path.name for path in checkpoint.parent.iterdir()] == ["run.safetensors"]


_SCRIPT = """
import sys
from pathlib import Path
from safetensors.torch import save_file
from tests_of_fit import _fit_images

def told(progress):
    print(progress.epoch, progress.batch, flush=True)
    if len(sys.argv) > 3:
        sys.stdin.readline()  # goes on when told to

weights, result = _fit_images(Path(sys.argv[1]), checkpoint_every_s=1e-9, progress=told)
save_file(weights, sys.argv[2])
print("resumed at", result.resumed_at, flush=True)
"""


def test_a_run_that_was_killed_ends_with_the_same_weights_bit_for_bit(tmp_path: Path) -> None:
    """Two processes: the first gets SIGKILL in its third epoch, the second takes up what it left."""
    n_lines = 2
    (tmp_path / "tests_of_fit.py").write_text(Path(__file__).read_text())
    checkpoint, saved = tmp_path / "run.safetensors", tmp_path / "weights.safetensors"
    command = [sys.executable, "-c", _SCRIPT, str(checkpoint), str(saved)]
    with subprocess.Popen(
        [*command, "wait"], cwd=tmp_path, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as victim:
        assert victim.stdin is not None
        assert victim.stdout is not None
        for _ in range(n_lines):
            assert victim.stdout.readline()
            victim.stdin.write("\n")
            victim.stdin.flush()
        assert victim.stdout.readline()  # the next epoch is over, and not yet judged
        victim.send_signal(signal.SIGKILL)
    assert victim.returncode == -signal.SIGKILL
    assert not saved.exists()
    second = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True)
    assert f"resumed at ({n_lines}, 2)" in second.stdout
    with safe_open(saved, framework="pt") as file:
        resumed = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a dict
    assert _same(_fit_images(None)[0], resumed)


_NARROW = """
import sys
from pathlib import Path
import torch
from modelyard.clock import ManualClock
from modelyard.metering import Meter
from modelyard.prices import load_prices
from modelyard.training.fit import Rows, fit
from modelyard.training.fit_config import FitConfig
from modelyard.training.networks import ImageNetwork

side, batch = int(sys.argv[1]), int(sys.argv[2])
for channels in [(4, 8), (8, 16), (4, 16), (12, 16)]:
    torch.manual_seed(0)
    x, y = torch.randint(0, 255, (4 * batch, side, side, 1), dtype=torch.uint8), torch.arange(4 * batch) % 2
    module = ImageNetwork(torch.tensor([0.4]), torch.tensor([0.2]), channels, 2, 0.1)
    config = FitConfig(epochs=6, patience=6, batch_size=batch, n_threads=2)
    fit(module, Rows(x, y), Rows(x[:batch], y[:batch]), config, meter=Meter(load_prices(), ManualClock()))
"""


@pytest.mark.parametrize(("side", "batch"), [(12, 5), (12, 7), (28, 5)])
def test_narrow_convolutions_in_odd_batches_leave_the_memory_sound(side: int, batch: int) -> None:
    """In a process of its own, since what it guards against ends the process, in one run or another."""
    done = subprocess.run(
        [sys.executable, "-c", _NARROW, str(side), str(batch)], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


class _Seen(nn.Module):
    """Notes whether oneDNN was in use when it was run."""

    def __init__(self, convolution: nn.Module) -> None:
        super().__init__()
        self.convolution, self.seen = convolution, set[bool]()

    def forward(self, x: Tensor) -> Tensor:
        self.seen.add(torch.backends.mkldnn.enabled)
        out: Tensor = self.convolution(x.permute(0, 3, 1, 2).to(torch.float32)).mean(dim=(2, 3))
        return out


@pytest.mark.parametrize(
    ("convolution", "one_dnn"),
    [
        (nn.Conv2d(1, 32, 3), True),  # the stem of the default network
        (nn.Sequential(nn.Conv2d(1, 16, 3), nn.Conv2d(16, 2, 3, stride=2)), True),
        (nn.Sequential(nn.Conv2d(1, 15, 3), nn.Conv2d(15, 2, 3, stride=2)), False),
        (nn.Sequential(nn.Conv2d(1, 8, 3), nn.Conv2d(8, 8, 3)), False),
        (nn.Conv2d(1, 32, 3, stride=2), False),
    ],
    ids=["stem", "sixteen", "fifteen", "unstrided", "strided-stem"],
)
def test_only_narrow_convolutions_are_kept_from_one_dnn(convolution: nn.Module, one_dnn: bool) -> None:
    module, before = _Seen(convolution), torch.backends.mkldnn.enabled
    _fit(module, _images(16), _images(8, seed=1), epochs=1)
    assert module.seen == {one_dnn}
    assert torch.backends.mkldnn.enabled == before


@pytest.mark.parametrize("settings", [{"seed": 2**32}, {"n_threads": 1025}])
def test_settings_that_no_library_takes_are_refused(settings: dict[str, int]) -> None:
    (name,) = settings
    with pytest.raises(ConfigError, match=name):
        convert(settings, FitConfig, source="yard.toml", error=ConfigError)

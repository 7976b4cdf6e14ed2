"""The training loop: AdamW on a one-cycle schedule, early stopping, checkpoints, exact resume.

The randomness of a batch (its rows, its dropout, its augmentation) is a function of (seed, epoch, batch) alone, so that a
run that was killed and resumed has the weights of one that was not, bit for bit on a CPU with the same number of threads.
Checkpoints are safetensors files, written beside and renamed; no pickle.
"""

import contextlib
import json
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from modelyard.errors import TrainingError
from modelyard.metering import Meter, Metered
from modelyard.schema import Frozen, convert, to_builtins
from modelyard.training.fit_config import FitConfig

WARM_UP_SHARE = 0.1
PROGRESS_EVERY_S = 0.25
MIN_ONEDNN_CHANNELS = 16
"""A convolution of fewer channels in is not given to oneDNN in training; see _sound_convolutions."""
MAX_PIXEL_CHANNELS = 4


@dataclass(frozen=True)
class Rows:
    """Inputs, shape (n, ...), and targets, shape (n,): int64 class codes or float32 values."""

    x: Tensor
    y: Tensor


@dataclass(frozen=True)
class FitProgress:
    """Where a running fit stands."""

    epoch: int
    epochs: int
    batch: int
    n_batches: int
    loss: float
    """Mean over this epoch so far."""
    best_score: float | None
    """On validation rows: accuracy for classes, RMSE for values."""
    remaining_s: float
    """If no epoch is saved by stopping early."""


@dataclass(frozen=True)
class FitResult:
    """The best weights are in the module that was given."""

    epochs_run: int
    stopped_early: bool
    best_loss: float
    best_score: float
    resumed_at: tuple[int, int] | None
    """(epoch, batch) a checkpoint was taken up at."""
    spent_before: Metered | None
    """By the run that was resumed, up to its last checkpoint."""
    device: str


class SquaredError(nn.Module):
    """Mean squared error in units of the training values' variance, so that gradients do not depend on the label's unit."""

    def __init__(self, train: Tensor) -> None:  # (n,) values
        super().__init__()
        self.variance = float(train.var(correction=0)) or 1.0

    def forward(self, out: Tensor, y: Tensor) -> Tensor:  # (n,), (n,) → scalar
        return nn.functional.mse_loss(out, y) / self.variance


class _State(Frozen, frozen=True):
    """The part of a checkpoint that is not tensors."""

    run_key: str
    epoch: int
    batch: int
    """Batches of this epoch that are done."""
    best_loss: float | None
    best_score: float | None
    epochs_since_best: int
    spent: Metered
    finished: bool


def fit(
    module: nn.Module,
    train: Rows,
    validation: Rows,
    config: FitConfig,
    *,
    meter: Meter,
    checkpoint: Path | None = None,
    run_key: str = "",
    progress: Callable[[FitProgress], None] = lambda _: None,
) -> FitResult:
    """Train `module` in place and leave the weights with the lowest validation loss in it.

    Args:
        checkpoint: written every `checkpoint_every_s`, and at the end of a run that took longer; a file with the same `run_key`
            is taken up.
        run_key: digest of everything that decides the result: data, split, configuration, versions.

    Raises:
        TrainingError: the loss is not a number, or the checkpoint is damaged or of another module.
    """
    with _threads(config.n_threads), _sound_convolutions(module):
        return _Loop(module, train, validation, config, meter, checkpoint, run_key, progress).run()


class _Loop:
    """One run. Constructed, run once, thrown away."""

    def __init__(
        self,
        module: nn.Module,
        train: Rows,
        validation: Rows,
        config: FitConfig,
        meter: Meter,
        checkpoint: Path | None,
        run_key: str,
        progress: Callable[[FitProgress], None],
    ) -> None:
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.amp = config.mixed_precision == "auto" and self.device == "cuda" and torch.cuda.is_bf16_supported()
        self.module = module.to(self.device)
        self.train, self.validation = train, validation
        self.config, self.meter = config, meter
        self.checkpoint, self.run_key, self.progress = checkpoint, run_key, progress
        self.loss = nn.CrossEntropyLoss() if train.y.dtype == torch.int64 else SquaredError(train.y)
        self.optimizer = torch.optim.AdamW(
            module.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay
        )
        self.n_batches = math.ceil(len(train.x) / config.batch_size)
        if len(train.x) % config.batch_size == 1 and self.n_batches > 1:
            self.n_batches -= 1  # batch norm has no deviation of one row: the last batch takes it
        self.epoch = self.batch = self.since_best = 0
        self.best_loss: float | None = None
        self.best_score: float | None = None
        self.best = {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}
        self.before: Metered | None = None
        self.finished = False
        self.saved_at_s = self.shown_at_s = self.started_at_s = time.monotonic()

    def run(self) -> FitResult:
        resumed_at = self._resume()
        first_step = self.epoch * self.n_batches + self.batch
        while not self.finished:
            self._epoch(first_step)
            self._judge()
        if time.monotonic() - self.started_at_s >= self.config.checkpoint_every_s:
            self._save()  # so that what comes after the fit can be killed too, and the fit is not repeated
        self.module.load_state_dict(self.best)
        self.module.eval().to("cpu")
        assert self.best_loss is not None  # at least one epoch was judged
        assert self.best_score is not None
        return FitResult(
            epochs_run=self.epoch,
            stopped_early=self.epoch < self.config.epochs,
            best_loss=self.best_loss,
            best_score=self.best_score,
            resumed_at=resumed_at,
            spent_before=self.before,
            device=self.device,
        )

    def _epoch(self, first_step: int) -> None:
        """Train the batches of this epoch that are not done yet."""
        config = self.config
        order = torch.from_numpy(np.random.default_rng([config.seed, self.epoch]).permutation(len(self.train.x)))
        seeds = np.random.SeedSequence([config.seed, self.epoch]).generate_state(self.n_batches).tolist()
        mixed = torch.autocast(self.device, torch.bfloat16) if self.amp else contextlib.nullcontext()
        self.module.train()
        total = torch.zeros((), device=self.device)
        first = self.batch
        for batch in range(self.batch, self.n_batches):
            is_last = batch == self.n_batches - 1
            rows = order[batch * config.batch_size : None if is_last else (batch + 1) * config.batch_size]
            x, y = self.train.x[rows].to(self.device), self.train.y[rows].to(self.device)
            self._seed(seeds[batch])
            if config.shift_pixels:
                x = shifted(x, config.shift_pixels)
            self._set_learning_rate(self.epoch * self.n_batches + batch)
            with mixed:
                loss = self.loss(_outputs(self.module(x), y), y)
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(self.module.parameters(), config.clip_norm)
            self.optimizer.step()
            total += loss.detach()
            self.batch = batch + 1
            now_s = time.monotonic()
            if now_s - self.shown_at_s >= PROGRESS_EVERY_S or self.batch == self.n_batches:
                self._show(float(total) / (self.batch - first), now_s, first_step)
            if now_s - self.saved_at_s >= config.checkpoint_every_s:
                self._save()

    def _seed(self, seed: int) -> None:
        """Seed dropout and augmentation. Not by torch.manual_seed, which takes a millisecond where there is no GPU."""
        torch.default_generator.manual_seed(seed)
        if self.device == "cuda":
            torch.cuda.manual_seed(seed)

    def _judge(self) -> None:
        """Close the epoch: keep the weights if the validation loss fell, stop when it has not for too long."""
        loss, score = self._validate()
        if not math.isfinite(loss):
            raise TrainingError(
                f"the validation loss is {loss} after epoch {self.epoch + 1}; lower fit.learning_rate (it is "
                f"{self.config.learning_rate}) and train again"
            )
        if self.best_loss is None or loss < self.best_loss:
            self.best_loss, self.best_score, self.since_best = loss, score, 0
            self.best = {name: tensor.detach().clone() for name, tensor in self.module.state_dict().items()}
        else:
            self.since_best += 1
        self.epoch, self.batch = self.epoch + 1, 0
        self.finished = self.epoch == self.config.epochs or self.since_best >= self.config.patience

    @torch.no_grad()
    def _validate(self) -> tuple[float, float]:
        self.module.eval()
        loss = error = 0.0
        for start in range(0, len(self.validation.x), 1024):
            x = self.validation.x[start : start + 1024].to(self.device)
            y = self.validation.y[start : start + 1024].to(self.device)
            out = _outputs(self.module(x), y)
            loss += float(self.loss(out, y)) * len(y)
            error += float((out.argmax(1) == y).sum() if y.dtype == torch.int64 else ((out - y) ** 2).sum())
        n = len(self.validation.x)
        return loss / n, error / n if self.validation.y.dtype == torch.int64 else math.sqrt(error / n)

    def _set_learning_rate(self, step: int) -> None:
        """One cycle: up in a line, down in a cosine. Source: Smith & Topin, Super-Convergence (2018)."""
        n_steps = self.config.epochs * self.n_batches
        warm_up = max(1, int(WARM_UP_SHARE * n_steps))
        down = (step - warm_up) / max(1, n_steps - warm_up)
        share = (step + 1) / warm_up if step < warm_up else 0.5 * (1 + math.cos(math.pi * down))
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.learning_rate * share

    def _show(self, loss: float, now_s: float, first_step: int) -> None:
        if not math.isfinite(loss):
            raise TrainingError(
                f"the loss is {loss} in epoch {self.epoch + 1}, batch {self.batch}; lower fit.learning_rate (it is "
                f"{self.config.learning_rate}) and train again"
            )
        self.shown_at_s = now_s
        done = self.epoch * self.n_batches + self.batch
        per_step_s = (now_s - self.started_at_s) / (done - first_step)
        self.progress(
            FitProgress(
                epoch=self.epoch + 1,
                epochs=self.config.epochs,
                batch=self.batch,
                n_batches=self.n_batches,
                loss=loss,
                best_score=self.best_score,
                remaining_s=per_step_s * (self.config.epochs * self.n_batches - done),
            )
        )

    def _spent(self) -> Metered:
        spent = self.meter.read()
        return spent if self.before is None else self.before + spent

    def _save(self) -> None:
        self.saved_at_s = time.monotonic()
        if self.checkpoint is None:
            return
        state = _State(
            run_key=self.run_key,
            epoch=self.epoch,
            batch=self.batch,
            best_loss=self.best_loss,
            best_score=self.best_score,
            epochs_since_best=self.since_best,
            spent=self._spent(),
            finished=self.finished,
        )
        tensors = {f"model.{name}": tensor for name, tensor in self.module.state_dict().items()}
        tensors |= {f"best.{name}": tensor for name, tensor in self.best.items()}
        for index, moments in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{name}": tensor for name, tensor in moments.items()}
        _write_checkpoint(self.checkpoint, tensors, state)

    def _resume(self) -> tuple[int, int] | None:
        """Take up the checkpoint if it is of this very run; return where."""
        if self.checkpoint is None or not self.checkpoint.exists():
            return None
        tensors, state = _read_checkpoint(self.checkpoint)
        if state.run_key != self.run_key:
            return None
        optimizer: dict[int, dict[str, Tensor]] = {}
        model: dict[str, Tensor] = {}
        best: dict[str, Tensor] = {}
        for key, tensor in tensors.items():
            kind, _, name = key.partition(".")
            if kind == "optimizer":
                index, _, moment = name.partition(".")
                optimizer.setdefault(int(index), {})[moment] = tensor
            else:
                (model if kind == "model" else best)[name] = tensor
        groups = self.optimizer.state_dict()["param_groups"]
        try:
            self.module.load_state_dict(best)  # tried here rather than when the run is over
            self.module.load_state_dict(model)
            self.optimizer.load_state_dict({"state": optimizer, "param_groups": groups})
        except (RuntimeError, ValueError) as exc:  # torch's words for missing tensors and other shapes
            raise TrainingError(
                f"{self.checkpoint}: its tensors are not those of this module; remove it to start anew"
            ) from exc
        self.best = best
        self.epoch, self.batch = state.epoch, state.batch
        self.best_loss, self.best_score, self.since_best = state.best_loss, state.best_score, state.epochs_since_best
        self.before, self.finished = state.spent, state.finished
        return state.epoch, state.batch


def shifted(x: Tensor, most: int) -> Tensor:
    """Move each image of (n, h, w, c) by up to `most` pixels along both axes, edges filled with zeros."""
    n, height, width, _ = x.shape
    padded = nn.functional.pad(x, (0, 0, most, most, most, most))
    down = torch.randint(0, 2 * most + 1, (n, 1, 1), device=x.device)
    right = torch.randint(0, 2 * most + 1, (n, 1, 1), device=x.device)
    image = torch.arange(n, device=x.device).reshape(n, 1, 1)
    row = torch.arange(height, device=x.device).reshape(1, height, 1) + down
    column = torch.arange(width, device=x.device).reshape(1, 1, width) + right
    return padded[image, row, column]


def _outputs(raw: Tensor, y: Tensor) -> Tensor:
    """Logits as they are; the single column of a regression as a vector."""
    return raw if y.dtype == torch.int64 else raw.reshape(len(y))


@contextlib.contextmanager
def _threads(n_threads: int) -> Iterator[None]:
    """Use `n_threads` inside the block; what was set before is set again after it, the generator's state too."""
    before, generator = torch.get_num_threads(), torch.get_rng_state()
    torch.set_num_threads(n_threads or os.cpu_count() or 1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
        torch.set_rng_state(generator)


@contextlib.contextmanager
def _sound_convolutions(module: nn.Module) -> Iterator[None]:
    """Keep narrow convolutions away from oneDNN ("mkldnn") inside the block.

    With two threads or more and batches of an odd size, its gradients of strided convolutions that take fewer than 16
    channels write past their memory, and the process ends in "corrupted size vs. prev_size", or computes on. Seen with
    torch 2.13.0 on x86-64 with AVX-512 for 4 to 15 channels in; not with 16 or more, with one thread, or without oneDNN.
    Unstrided ones were sound alone, and are kept away too but for a stem over pixels, so that the default networks keep
    their speed.
    """
    if not any(_is_narrow(part) for part in module.modules()):
        yield
        return
    with torch.backends.mkldnn.flags(enabled=False, allow_tf32=None):  # naming TF32 would warn on a CPU
        yield


def _is_narrow(part: nn.Module) -> bool:
    if not isinstance(
        part, nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d
    ):
        return False
    is_stem = part.in_channels <= MAX_PIXEL_CHANNELS and all(step == 1 for step in part.stride)
    return part.in_channels < MIN_ONEDNN_CHANNELS and not is_stem


def _write_checkpoint(path: Path, tensors: dict[str, Tensor], state: _State) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    plain = {name: tensor.detach().to("cpu").contiguous().clone() for name, tensor in tensors.items()}
    save_file(plain, beside, metadata={"state": json.dumps(to_builtins(state))})
    beside.replace(path)


def _read_checkpoint(path: Path) -> tuple[dict[str, Tensor], _State]:
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            metadata: dict[str, str] = file.metadata() or {}
            tensors: dict[str, Any] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a dict
            data = json.loads(metadata["state"])
    except (SafetensorError, KeyError, json.JSONDecodeError) as exc:
        raise TrainingError(f"{path}: not a checkpoint of ours ({exc}); remove it to start anew") from exc
    return tensors, convert(data, _State, source=str(path), error=TrainingError)

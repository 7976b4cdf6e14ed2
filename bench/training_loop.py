"""What the training loop costs beyond a plain PyTorch loop on the same model and batches.

Both train the same network on the same rows in the same order, validate once an epoch, and run in turns; ours also keeps its
schedule, its progress, its best weights and a checkpoint. The bar: at most 5 % more time.
"""

import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from machine import bar, heading
from torch import Tensor, nn

from modelyard.metering import Meter
from modelyard.prices import load_prices
from modelyard.statistics import ratio_interval
from modelyard.training.fit import Rows, fit
from modelyard.training.fit_config import FitConfig
from modelyard.training.networks import ImageNetwork, TableNetwork

N_PAIRS = 30
PRICES = load_prices()
CONFIG = FitConfig(epochs=2, batch_size=256, patience=99)


def plain_loop(module: nn.Module, train: Rows, validation: Rows, order: list[Tensor]) -> None:
    optimizer = torch.optim.AdamW(module.parameters(), lr=CONFIG.learning_rate, weight_decay=CONFIG.weight_decay)
    loss_function = nn.CrossEntropyLoss()
    for rows in order:
        module.train()
        for start in range(0, len(rows), CONFIG.batch_size):
            batch = rows[start : start + CONFIG.batch_size]
            loss = loss_function(module(train.x[batch]), train.y[batch])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(module.parameters(), CONFIG.clip_norm)
            optimizer.step()
        module.eval()
        with torch.no_grad():
            for start in range(0, len(validation.x), 1024):
                loss_function(module(validation.x[start : start + 1024]), validation.y[start : start + 1024])


def table() -> tuple[nn.Module, Rows, Rows]:
    x, y = torch.randn(20_000, 60), torch.randint(0, 2, (20_000,))
    return TableNetwork(60, (128, 64), 2, 0.1), Rows(x[:18_000], y[:18_000]), Rows(x[18_000:], y[18_000:])


def image() -> tuple[nn.Module, Rows, Rows]:
    x = torch.randint(0, 256, (1_200, 28, 28, 1), dtype=torch.uint8)
    y = torch.randint(0, 10, (1_200,))
    network = ImageNetwork(torch.tensor([0.1]), torch.tensor([0.3]), (16, 32), 10, 0.1)
    return network, Rows(x[:1_000], y[:1_000]), Rows(x[1_000:], y[1_000:])


def main() -> int:
    heading("training loop against a plain PyTorch loop", "torch")
    met = True
    for make in (table, image):
        torch.manual_seed(0)
        ours_s: list[float] = []
        plain_s: list[float] = []
        for pair in range(N_PAIRS + 1):
            module, train, validation = make()
            start = {name: tensor.clone() for name, tensor in module.state_dict().items()}
            order = [
                torch.from_numpy(np.random.default_rng([CONFIG.seed, epoch]).permutation(len(train.x)))
                for epoch in range(CONFIG.epochs)
            ]
            with tempfile.TemporaryDirectory() as folder:
                for ours in (True, False) if pair % 2 else (False, True):
                    module.load_state_dict(start)
                    before_s = time.perf_counter()
                    if ours:
                        checkpoint = Path(folder) / "checkpoint.safetensors"
                        fit(module, train, validation, CONFIG, meter=Meter(PRICES), checkpoint=checkpoint)
                    else:
                        plain_loop(module, train, validation, order)
                    (ours_s if ours else plain_s).append(time.perf_counter() - before_s)
        ratio = ratio_interval(np.array(ours_s[1:]), np.array(plain_s[1:]))
        met &= bar(
            f"{make.__name__}: {ratio.value:.3f} × the plain loop's time ({ratio.low:.3f} to {ratio.high:.3f}, {N_PAIRS} pairs, "
            f"plain {np.median(plain_s):.2f} s); at most 1.05",
            ratio.value <= 1.05,
        )
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())

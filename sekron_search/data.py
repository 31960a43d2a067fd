"""Data: built-in digits, image folders, factories; batches with a seed; metrics."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from dataclasses import dataclass
from itertools import count
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset, default_collate

from sekron_search.errors import DataError, users_own
from sekron_search.image_files import ImageFolder, common_size, labelled
from sekron_search.model import Inputs, as_inputs, device_of, joined, part_of
from sekron_search.model import batch_size as samples_of
from sekron_search.nested import map_tensors
from sekron_search.references import import_reference
from sekron_search.sections import DataConfig, MetricName

Batch = tuple[Inputs, Any]
Augment = Callable[[Tensor, torch.Generator], Tensor]


@dataclass(frozen=True)
class DataBundle:
    """Three disjoint splits of (input, target) pairs.

    Args:
        train: For fine-tuning; calibration samples are drawn from it without their labels.
        validation: For choosing.
        test: Touched once, at the end.
        augment: Applied to the network's first argument in fine-tuning: a function of (batch, generator).
    """

    train: Dataset[Any]
    validation: Dataset[Any]
    test: Dataset[Any]
    augment: Augment | None = None


def length(dataset: Dataset[Any]) -> int:
    """Number of samples; a `DataError` if the dataset does not know."""
    if not isinstance(dataset, Sized):
        raise DataError(f"expected a dataset with a length, got {type(dataset).__name__}")
    return len(dataset)


def batches(dataset: Dataset[Any], batch_size: int, *, order: Sequence[int] | None = None) -> Iterator[Batch]:
    """Batches of (inputs, target) in the given order of samples; a dataset of tensors is sliced at once."""
    indices = torch.arange(length(dataset)) if order is None else torch.as_tensor(order, dtype=torch.long)
    # Not a subclass that gives other samples than its tensors hold: normalised, augmented.
    if isinstance(dataset, TensorDataset) and type(dataset).__getitem__ is TensorDataset.__getitem__:
        for chunk in indices.split(batch_size):
            yield as_batch(tuple(tensor[chunk] for tensor in dataset.tensors))
        return
    loader: DataLoader[Any] = DataLoader(Subset(dataset, indices.tolist()), batch_size=batch_size, collate_fn=_collated)
    for item in readable(loader):
        yield as_batch(item)


def _collated(samples: list[Any]) -> Any:
    """As torch does by default; of samples without a target, (inputs, None), a batch without one."""
    if all(isinstance(sample, tuple | list) and len(sample) == 2 and sample[1] is None for sample in samples):
        return default_collate([inputs for inputs, _ in samples]), None
    return default_collate(samples)


def readable(source: Iterable[Any]) -> Iterator[Any]:
    """The items of a user's data; whatever goes wrong when one is read is a `DataError` that counts them."""
    items, end = iter(source), object()
    for number in count(1):
        with users_own(f"the data: batch {number} could not be read"):
            item = next(items, end)
        if item is end:
            return
        yield item


def sample_order(count: int, seed: int) -> list[int]:
    """A random order of `count` samples."""
    order: list[int] = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
    return order


def as_batch(item: Any) -> Batch:
    """(inputs, target) from what a loader gives: a pair, or the input alone."""
    if isinstance(item, tuple | list) and len(item) == 2:
        return as_inputs(item[0]), item[1]
    return as_inputs(item), None


def input_batches(source: Any, batch_size: int) -> list[Inputs]:
    """Inputs only, from a tensor, a tuple of the network's arguments, a dataset, or an iterable of batches.

    What a dataset or an iterable gives are pairs of inputs and targets, or inputs alone.

    Raises:
        DataError: If there is nothing in it.
    """
    if isinstance(source, Tensor):
        source = (source,)
    if isinstance(source, tuple) and source and not any(isinstance(item, tuple | list) for item in source):
        size = samples_of(source)
        found = [part_of(source, slice(start, start + batch_size)) for start in range(0, size, batch_size)]
    elif isinstance(source, Dataset):
        found = [inputs for inputs, _ in batches(source, batch_size)]
    elif isinstance(source, Iterable):
        found = [as_batch(item)[0] for item in readable(source)]
    else:
        raise DataError(
            "calibration: expected a tensor, a tuple of the network's arguments, a dataset or an iterable of batches, "
            f"got {type(source).__name__}"
        )
    if not found:
        raise DataError("the calibration data is empty; give at least one batch")
    return whole_batches(found)


def whole_batches(found: Sequence[Inputs]) -> list[Inputs]:
    """The batches, a last one of a single sample joined to the one before: batch-norms cannot train on one sample."""
    if len(found) < 2 or samples_of(found[-1]) > 1:
        return list(found)
    try:
        return [*found[:-2], joined(found[-2:])]
    except DataError:  # sequences of other lengths, images of other sizes
        return list(found)


def to_device(value: Any, device: torch.device) -> Any:
    """The same with its tensors on the device, however they are nested."""
    return map_tensors(lambda tensor: tensor.to(device), value)


def load_data(config: DataConfig, seed: int) -> DataBundle:
    """The data that a configuration describes."""
    if config.source == "digits":
        return digits(seed)
    if config.source == "folder":
        assert config.path is not None
        return image_folder(config, seed)
    assert config.factory is not None
    function = import_reference(config.factory, "data.factory")
    with users_own(f"data.factory {config.factory!r} failed"):
        bundle = function(**config.kwargs)
    if not isinstance(bundle, DataBundle):
        raise DataError(f"data.factory {config.factory!r} must return a DataBundle, got {type(bundle).__name__}")
    for split in ("train", "validation", "test"):
        if length(getattr(bundle, split)) == 0:
            raise DataError(f"data.factory {config.factory!r}: the split '{split}' is empty")
    return bundle


def digits(seed: int = 0) -> DataBundle:
    """scikit-learn's handwritten digits: 1,797 images of 8x8, split 1,097 / 300 / 400.

    Raises:
        DataError: If scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise DataError("the digits need scikit-learn: pip install scikit-learn") from None
    raw = load_digits()
    images = torch.from_numpy(raw.images).float()[:, None] / 16
    dataset = TensorDataset((images - 0.305) / 0.376, torch.from_numpy(raw.target).long())
    train, validation, test = _split(dataset, [400, 300], seed)
    return DataBundle(train, validation, test)


def _split(dataset: TensorDataset, sizes: Sequence[int], seed: int) -> tuple[TensorDataset, ...]:
    """(the rest, second size, first size) of a shuffled dataset."""
    order = torch.as_tensor(sample_order(len(dataset), seed))
    parts = torch.split(order, [sizes[0], sizes[1], len(order) - sum(sizes)])
    return tuple(TensorDataset(*(t[part] for t in dataset.tensors)) for part in reversed(parts))


def image_folder(config: DataConfig, seed: int) -> DataBundle:
    """Images in `path/<class>/`, split at random, or in `path/train|validation|test/<class>/`.

    Raises:
        DataError: If a folder is missing or empty, the splits do not have the same classes, or the images are of
            different sizes and the configuration does not say which one they get.
    """
    root = config.path
    assert root is not None
    if not root.is_dir():
        raise DataError(f"data.path {root}: expected a folder with a sub-folder per class")
    if (root / "train").is_dir():
        classes, train = labelled(root / "train")
        splits = {}
        for name in ("validation", "test"):
            if not (root / name).is_dir():
                raise DataError(f"data.path {root}: it has a folder 'train' but none named '{name}'")
            found, splits[name] = labelled(root / name)
            if extra := sorted(set(found) - set(classes)):
                raise DataError(f"data.path {root / name}: classes {extra} are not in the training folder")
            relabel = {i: classes.index(label) for i, label in enumerate(found)}
            splits[name] = [(path, relabel[i]) for path, i in splits[name]]
        validation, test = splits["validation"], splits["test"]
    else:
        classes, files = labelled(root)
        order = sample_order(len(files), seed)
        num_test = round(config.test_fraction * len(files))
        num_validation = round(config.validation_fraction * len(files))
        if min(num_test, num_validation, len(files) - num_test - num_validation) < 1:
            raise DataError(f"data.path {root}: {len(files)} images are too few to split into three parts")
        shuffled = [files[i] for i in order]
        test, validation = shuffled[:num_test], shuffled[num_test : num_test + num_validation]
        train = shuffled[num_test + num_validation :]
    size = config.image_size or common_size(root, [path for path, _ in (*train, *validation, *test)])
    return DataBundle(
        ImageFolder(train, size, config), ImageFolder(validation, size, config), ImageFolder(test, size, config)
    )


@dataclass(frozen=True)
class SplitMetric:
    """A metric by name, over a split of the data.

    Args:
        split: The data.
        name: Of the metric.
        batch_size: Samples that the network is run on at a time.
    """

    split: Dataset[Any]
    name: MetricName
    batch_size: int

    def __call__(self, network: nn.Module) -> float:
        """The metric of a network; see `evaluate`."""
        return evaluate(network, self.split, self.name, batch_size=self.batch_size)

    @property
    def shares_of(self) -> int | None:
        """The number of samples of which the metric is the share that is right; None if it is no such share.

        Of images whose every position has a class, these are the images, for neighbours are not right or wrong by
        themselves: an interval for so many is rather too wide than too narrow.
        """
        return length(self.split) if self.name == "accuracy" else None


def evaluate(model: nn.Module, dataset: Dataset[Any], metric: MetricName, *, batch_size: int) -> float:
    """A metric by name over a dataset, computed where the network is; higher is better.

    Raises:
        DataError: If a label is not one of the network's classes, or the metric is not a number.
    """
    model.eval()
    device = device_of(model)
    with torch.no_grad():
        values = [
            values_of_samples(metric, model(*to_device(inputs, device)), target)
            for inputs, target in batches(dataset, batch_size)
        ]
    value = float(torch.cat(values).mean())
    if not np.isfinite(value):
        raise DataError(f"the metric '{metric}' is {value}: the network's outputs or the targets hold NaN or infinity")
    return value


def values_of_samples(metric: MetricName, output: Any, target: Any) -> Tensor:
    """(N,) in float64, on the CPU: the metric of every sample of a batch, of which a dataset's is the mean.

    Raises:
        DataError: As for `evaluate`.
    """
    if not isinstance(output, Tensor):
        raise DataError(
            f"metric '{metric}' needs a network that returns one tensor, got {type(output).__name__}; give a "
            "function of (network, dataset) of your own: metric: package.module:function"
        )
    if not isinstance(target, Tensor):
        raise DataError(f"metric '{metric}' needs data with a target per sample, got {type(target).__name__}")
    if metric != "accuracy" and target.shape != output.shape:  # torch would broadcast them
        raise DataError(
            f"metric '{metric}' is of targets of the output's shape {tuple(output.shape)}, got {tuple(target.shape)}; "
            "give the data or the network the other's shape, or metric a function of your own"
        )
    values = _METRICS[metric](output, target.to(output.device))
    return values.double().reshape(len(output), -1).mean(1).cpu()


def check_labels(labels: Tensor, logits: Tensor) -> None:
    """Raise a `DataError` unless there is a class index for every position of the logits (N, classes, ...)."""
    wanted = (logits.shape[0], *logits.shape[2:])
    if labels.is_floating_point() or labels.shape != wanted:
        raise DataError(
            f"expected integer class labels of shape {tuple(wanted)}, got {labels.dtype} of shape {tuple(labels.shape)}"
        )
    labels = labels.long()  # of some of the other types torch finds no least and largest one
    low, high, classes = int(labels.min()), int(labels.max()), logits.shape[1]
    if low < 0 or high >= classes:
        raise DataError(f"labels run from {low} to {high}, the network has {classes} classes (0 to {classes - 1})")


def _accuracy(output: Tensor, target: Tensor) -> Tensor:
    if target.is_floating_point():
        raise DataError(
            f"metric 'accuracy' is of integer class labels, got {target.dtype} of shape {tuple(target.shape)}; "
            "of values set metric to 'neg_mse', 'psnr' or a function of your own, and search.divergence to 'mse'"
        )
    check_labels(target, output)
    return output.argmax(1) == target.long()


def _neg_mse(output: Tensor, target: Tensor) -> Tensor:
    return -F.mse_loss(output.float(), target.float(), reduction="none")


def _psnr(output: Tensor, target: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of images in [0, 1]."""
    error = (output.float().clamp(0, 1) - target.float()).square().flatten(1).mean(1)
    return -10 * error.clamp_min(1e-12).log10()


#: Of (output, target): (N, ...), a sample's metric is the mean of its entries.
_METRICS: dict[MetricName, Callable[[Tensor, Tensor], Tensor]] = {
    "accuracy": _accuracy,
    "neg_mse": _neg_mse,
    "psnr": _psnr,
}

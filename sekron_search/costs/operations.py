"""Operations: what a device profile measures and a latency model predicts, with a text form that parses back.

Every operation is a frozen record of integers, float32 throughout. `flops` are multiply-adds; `read`, `weights` and
`written` are elements.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import cached_property
from math import prod
from typing import ClassVar

from sekron_search.errors import ConfigError
from sekron_search.kron.geometry import Size

#: Bytes of an element.
ELEMENT_BYTES = 4


@dataclass(frozen=True)
class Operation:
    """One operation of a runtime; see the subclasses for what there is."""

    kind: ClassVar[str]

    @property
    def flops(self) -> int:
        """Multiply-adds."""
        return 0

    @property
    def read(self) -> int:
        """Elements read, weights not counted."""
        raise NotImplementedError

    @property
    def weights(self) -> int:
        """Elements of weights."""
        return 0

    @property
    def written(self) -> int:
        """Elements written."""
        raise NotImplementedError

    @cached_property
    def moved_bytes(self) -> int:
        """Bytes read and written."""
        return ELEMENT_BYTES * (self.read + self.weights + self.written)

    @cached_property
    def _text(self) -> str:
        values = ((f.name, getattr(self, f.name)) for f in fields(self))
        return " ".join([self.kind, *(f"{name}={_shown(value)}" for name, value in values)])

    def __str__(self) -> str:
        return self._text

    @staticmethod
    def parse(text: str) -> Operation:
        """The operation of a text form.

        Raises:
            ConfigError: If the text is not one.
        """
        kind, _, rest = text.partition(" ")
        try:
            cls = KINDS[kind]
            tuples = {f.name for f in fields(cls) if f.type == "Size"}
            given = dict(pair.split("=") for pair in rest.split())
            return cls(**{n: _size(v) if n in tuples else int(v) for n, v in given.items()})
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(
                f"operation {text!r}: {type(error).__name__}: {error}; expected one of {', '.join(KINDS)} and its "
                "fields, such as 'linear rows=1 in_features=64 out_features=10'"
            ) from None


@dataclass(frozen=True)
class Convolution(Operation):
    """A convolution with two or three spatial axes.

    Args:
        batch: Samples.
        in_channels, out_channels: Of all groups.
        size: Spatial size of the input.
        kernel, stride, dilation, padding: Per axis; the padding is the same at both ends.
        groups: Number of groups.
        output_padding: Of a transposed convolution, per axis; empty for a convolution that is not transposed.
    """

    kind = "conv"
    batch: int
    in_channels: int
    out_channels: int
    size: Size
    kernel: Size
    stride: Size
    dilation: Size
    padding: Size
    groups: int
    output_padding: Size = ()

    @property
    def transposed(self) -> bool:
        """Whether it is a transposed convolution."""
        return self.output_padding != ()

    @cached_property
    def output_size(self) -> Size:
        """Spatial size of the output."""
        axes = zip(self.size, self.kernel, self.stride, self.dilation, self.padding, strict=True)
        if self.transposed:
            extras = self.output_padding
            spans = ((n - 1) * s - 2 * p + d * (k - 1) + 1 for n, k, s, d, p in axes)
            return tuple(span + extra for span, extra in zip(spans, extras, strict=True))
        return tuple((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, d, p in axes)

    @cached_property
    def flops(self) -> int:
        """Multiply-adds."""
        return self.weights * self.batch * prod(self.size if self.transposed else self.output_size)

    @cached_property
    def read(self) -> int:
        """Elements of the input."""
        return self.batch * self.in_channels * prod(self.size)

    @cached_property
    def weights(self) -> int:
        """Elements of the weight."""
        return self.out_channels * self.in_channels // self.groups * prod(self.kernel)

    @cached_property
    def written(self) -> int:
        """Elements of the output."""
        return self.batch * self.out_channels * prod(self.output_size)


@dataclass(frozen=True)
class Linear(Operation):
    """A matrix of `rows` times a weight, or `batch` such products, each with a weight of its own."""

    kind = "linear"
    rows: int
    in_features: int
    out_features: int
    batch: int = 1

    @property
    def flops(self) -> int:
        """Multiply-adds."""
        return self.rows * self.weights

    @property
    def read(self) -> int:
        """Elements of the input."""
        return self.batch * self.rows * self.in_features

    @property
    def weights(self) -> int:
        """Elements of the weights."""
        return self.batch * self.in_features * self.out_features

    @property
    def written(self) -> int:
        """Elements of the output."""
        return self.batch * self.rows * self.out_features


@dataclass(frozen=True)
class Copy(Operation):
    """A permutation that moves data: `outer` times (rows, columns, run) into (columns, rows, run) elements.

    A plain copy has rows = columns = 1 and all of its elements in the run.
    """

    kind = "copy"
    outer: int
    rows: int
    columns: int
    run: int

    @property
    def read(self) -> int:
        """Elements."""
        return self.outer * self.rows * self.columns * self.run

    @property
    def written(self) -> int:
        """Elements."""
        return self.read


@dataclass(frozen=True)
class Elementwise(Operation):
    """A function of every element of `inputs` tensors of that many elements."""

    kind = "elementwise"
    elements: int
    inputs: int

    @property
    def read(self) -> int:
        """Elements of all inputs."""
        return self.elements * self.inputs

    @property
    def written(self) -> int:
        """Elements of the output."""
        return self.elements


@dataclass(frozen=True)
class Pool(Operation):
    """A maximum or mean over `window` of a channel's `inputs`, for each of its `positions`, per channel and sample."""

    kind = "pool"
    batch: int
    channels: int
    inputs: int
    positions: int
    window: int

    @property
    def flops(self) -> int:
        """Elements that are looked at."""
        return self.written * self.window

    @property
    def read(self) -> int:
        """Elements of the input."""
        return self.batch * self.channels * self.inputs

    @property
    def written(self) -> int:
        """Elements of the output."""
        return self.batch * self.channels * self.positions


#: Every kind of operation, by the name it has in its text form.
KINDS: dict[str, type[Operation]] = {cls.kind: cls for cls in (Convolution, Linear, Copy, Elementwise, Pool)}


def _shown(value: int | Size) -> str:
    return "x".join(map(str, value)) or "none" if isinstance(value, tuple) else str(value)


def _size(text: str) -> Size:
    return () if text == "none" else tuple(int(n) for n in text.split("x"))

"""Curves and histograms of a result, as numbers; who draws them is `aib_tf.evaluation.report`."""

import dataclasses
from collections.abc import Mapping, Sequence

KINDS = ("line", "bar")


@dataclasses.dataclass(frozen=True)
class Line:
    """One line, or the bars of one colour.

    Attributes:
        x: Places, in the order in which the line goes through them.
        y: Values.
        low: Lower ends of the 95% intervals, or None.
        high: Upper ends, or None.

    Raises:
        ValueError: The lengths differ, or only one end is given.
    """

    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None

    def __post_init__(self):
        for name in ("x", "y", "low", "high"):
            values = getattr(self, name)
            if values is not None:
                object.__setattr__(self, name, [float(value) for value in values])
        lengths = {name: len(values) for name, values in vars(self).items() if values is not None}
        if len(set(lengths.values())) != 1 or (self.low is None) != (self.high is None):
            raise ValueError(f"A line needs as many y, and low and high or neither, as x. Received: lengths={lengths}")


@dataclasses.dataclass(frozen=True)
class Chart:
    """Lines that share their axes.

    Attributes:
        x_label: What x is, with its unit.
        y_label: What y is, with its unit.
        lines: Name to line.
        kind: "line", or "bar" for a histogram whose x are the middles of its bins.
        diagonal: Whether y = x is drawn as the line to compare with.

    Raises:
        ValueError: The kind is unknown, or there is no line.
    """

    x_label: str
    y_label: str
    lines: Mapping[str, Line]
    kind: str = "line"
    diagonal: bool = False

    def __post_init__(self):
        if self.kind not in KINDS or not self.lines:
            raise ValueError(
                f"A chart needs a line, and its kind is one of {', '.join(KINDS)}. "
                f"Received: kind={self.kind!r}, lines={list(self.lines)}"
            )

    def to_dict(self) -> dict:
        """The same as a dict that JSON can hold."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping) -> "Chart":
        """What `to_dict` returned, possibly read back from JSON."""
        return cls(**{**values, "lines": {name: Line(**line) for name, line in values["lines"].items()}})

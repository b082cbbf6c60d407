"""Results as a table for the console and as a JSON file."""

import os
from collections.abc import Mapping

from aib_tf import files
from aib_tf.evaluation.suite import Result, Skipped

_HEAD = ("suite", "metric", "value", "95% interval", "images")


def table(results: Result | Mapping[str, Result | Skipped]) -> str:
    """Renders results as plain text: suite, metric, value, 95% interval, number of images.

    Args:
        results: One result, or what `aib_tf.evaluation.evaluate` returned.

    Returns:
        Lines without a final line end. Details and reasons for skipping stand below the table.
    """
    rows, notes = [], []
    for result in _listed(results):
        if isinstance(result, Skipped):
            notes.append(f"{result.suite}: skipped, {result.reason}")
            continue
        for index, (name, estimate) in enumerate(result.metrics.items()):
            value, low, high = (_number(number) for number in (estimate.value, estimate.low, estimate.high))
            first = result.suite if index == 0 else ""
            label = name.replace("_", " ")
            rows.append((first, label, value, f"{low} to {high}", f"{estimate.images:,}"))
        details = {"samples": result.samples, **result.details}
        shown = ", ".join(
            f"{name.replace('_', ' ')} {f'{value:.4g}' if isinstance(value, float) else value}"
            for name, value in details.items()
        )
        notes.append(f"{result.suite}: {shown}")
    lines = []
    if rows:
        widths = [max(map(len, column)) for column in zip(_HEAD, *rows, strict=True)]
        rule = tuple("-" * width for width in widths)
        lines = [_line(row, widths) for row in (_HEAD, rule, *rows)] + [""]
    return "\n".join(lines + notes)


def write_json(path: str | os.PathLike, results: Result | Mapping[str, Result | Skipped], **context) -> None:
    """Writes results as JSON, whole or not at all.

    Args:
        path: The file.
        results: One result, or what `aib_tf.evaluation.evaluate` returned.
        **context: What else belongs into the file, such as the run; keys beside "suites".

    Raises:
        ValueError: A number is NaN or infinite.
    """
    suites = {result.suite: result.to_dict() for result in _listed(results)}
    files.write_json(path, {**context, "suites": suites})


def _listed(results):
    return list(results.values()) if isinstance(results, Mapping) else [results]


def _number(value: float) -> str:
    if abs(value) < 10:
        return f"{value:.4f}"
    return f"{value:.2f}" if abs(value) < 1000 else f"{value:,.1f}"


def _line(row, widths) -> str:
    left = [cell.ljust(width) for cell, width in zip(row[:2], widths[:2], strict=True)]
    right = [cell.rjust(width) for cell, width in zip(row[2:], widths[2:], strict=True)]
    return "  ".join(left + right)

"""Pictures of attention and of training, drawn with matplotlib's objects.

Nothing here touches pyplot or rcParams, so the functions work without a display and from several
threads, and leave a caller's own plots alone. Colours are viridis, whose lightness rises evenly
with the value and which reads the same with every kind of colour vision.
"""

import math
import os
from collections.abc import Mapping, Sequence

import numpy as np

from aib_tf import files, maps

__all__ = ["attention_grid", "figure_to_array", "overlay", "save_figure", "training_curves"]

_COLOURS = "viridis"
# Vermillion and blue of the Okabe-Ito palette: apart for every kind of colour vision.
_WRONG = "#D55E00"
_TRAINING, _VALIDATION = "#0072B2", "#D55E00"
_TEXT = "#222222"

# Columns of an attention grid before it continues in a further band of rows, letters of a line of
# a title, and inches.
_COLUMNS = 8
_LETTERS = 22
_CELL, _GAP, _TITLE, _LABEL, _BAR = 1.1, 0.06, 0.42, 0.85, 1.0

# Panel of training_curves: title, axis label, names under which a history may hold it.
_PANELS = (
    ("Accuracy", "share of images", ("accuracy",)),
    ("Cross-entropy", "bits", ("cross_entropy_bits", "cross_entropy")),
    ("Rate: bound on I(Z;X)", "bits", ("rate_bits", "rate")),
)
_LABEL_INFORMATION = ("label_information_bits", "label_information", "information_label")


def overlay(
    image: np.ndarray,
    attention_map: np.ndarray,
    alpha: float = 0.6,
    value_range: tuple[float, float] | None = None,
) -> np.ndarray:
    """Lays an attention map in colour over the grey image.

    The image turns grey (Rec. 601 luma), so that all colour is attention: dark violet for the
    lowest, yellow for the highest. The map is enlarged bilinearly with half-pixel centres.

    Args:
        image: uint8, (H, W, 3), (H, W, 1) or (H, W).
        attention_map: Float, (h, w).
        alpha: Weight of the colour, in 0..1.
        value_range: The values of the map that get the first and the last colour; values beyond
            are clipped, so that maps drawn with one range compare. None stretches the map's own
            minimum and maximum, so that the place shows however narrow its range is; a constant
            map, which has no place, then gets the first colour.

    Returns:
        uint8, (H, W, 3).

    Raises:
        ValueError: A shape, `alpha` or the range is impossible, or the map holds NaN.
        TypeError: The image is not uint8.
    """
    from matplotlib import colormaps

    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must lie in 0..1. Received: alpha={alpha}")
    image = np.asarray(image)
    image = _check_images(image[..., None] if image.ndim == 2 else image, "image", 3)
    attention_map = _check_maps(attention_map, "attention_map", 2)
    low, high = _check_range(value_range, attention_map)
    enlarged = maps.upsample(attention_map, *image.shape[:2])
    scaled = np.clip((enlarged - low) / (high - low), 0, 1) if high > low else 0 * enlarged
    colours = colormaps[_COLOURS](scaled)[..., :3] * 255
    grey = image @ np.array([0.299, 0.587, 0.114]) if image.shape[-1] == 3 else image[..., 0]
    return np.rint(alpha * colours + (1 - alpha) * grey[..., None]).astype(np.uint8)


def attention_grid(
    images: np.ndarray,
    attention: np.ndarray,
    quantized: np.ndarray | None = None,
    titles: Sequence[str] | None = None,
    boxes: np.ndarray | None = None,
    *,
    labels: Sequence[int] | None = None,
    predictions: Sequence[int] | None = None,
    class_names: Sequence[str] | None = None,
    value_range: tuple[float, float] | None = None,
):
    """Draws images in columns: image, attention, quantized attention, overlay below one another.

    One colour scale serves the whole figure, overlays included; its bar stands at the right, with
    a mark for each level that the quantized maps hold. Maps are drawn as they are, one block per
    position; only the overlay enlarges them smoothly. Figures grow by bands of eight columns.

    Args:
        images: uint8, (B, H, W, 1) or (B, H, W, 3).
        attention: Float, (B, h, w).
        quantized: Float, (B, h, w), or None.
        titles: One per image, in place of the title made of labels and predictions. Long
            lines are drawn smaller, and cut at 22 letters.
        boxes: (B, 4), [ymin, xmin, ymax, xmax] as shares of the image sides, or None. Drawn on
            image and overlay; a box without area is left out.
        labels: True classes. A prediction that differs is marked by a coloured frame and by
            words, also where `titles` are given.
        predictions: Predicted classes.
        class_names: Names of the classes; numbers otherwise.
        value_range: The values at the two ends of the colour scale. None takes the smallest and
            the largest value in the figure.

    Returns:
        A `matplotlib.figure.Figure`.

    Raises:
        ValueError: There are no images, a shape or the range is impossible, or a map holds NaN.
        TypeError: The images are not uint8.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    images = _check_images(images, "images", 4)
    count, height, width = images.shape[:3]
    if count == 0:
        raise ValueError("A grid needs at least one image. Received: images=0")
    attention = _check_maps(attention, "attention", 3, count)
    panels = {"image": None, "attention": attention}
    if quantized is not None:
        panels["quantized"] = quantized = _check_maps(quantized, "quantized", 3, count)
    panels["overlay"] = None
    for name, value in dict(titles=titles, boxes=boxes, labels=labels, predictions=predictions).items():
        if value is not None and len(value) != count:
            raise ValueError(f"{name} must be one per image. Received: len({name})={len(value)}")
    shown = attention.ravel()
    if quantized is not None:
        shown = np.concatenate([shown, quantized.ravel()])
    low, high = _check_range(value_range, shown)
    if low == high:  # The scale of a constant still needs two ends.
        low, high = min(low, 0.0), max(high, 1.0)
    wrong = np.zeros(count, bool)
    if labels is not None and predictions is not None:
        wrong = np.asarray(labels) != np.asarray(predictions)
    texts = titles if titles is not None else _titles(count, labels, predictions, class_names)
    texts = None if texts is None else [_shortened(text) for text in texts]

    columns = min(count, _COLUMNS)
    bands = math.ceil(count / _COLUMNS)
    cell_height = _CELL * min(max(height / width, 0.4), 2.5)
    band = _TITLE + len(panels) * (cell_height + _GAP) + 0.12
    size = (_LABEL + columns * (_CELL + _GAP) + _BAR, bands * band + 0.1)
    figure = Figure(figsize=size, dpi=120, facecolor="white")

    def add_axes(left, top, box_width, box_height):
        """Axes by their upper left corner, in inches from that of the figure."""
        return figure.add_axes(
            [left / size[0], 1 - (top + box_height) / size[1],
             box_width / size[0], box_height / size[1]]
        )  # fmt: skip

    scale = dict(cmap=_COLOURS, vmin=low, vmax=high, interpolation="nearest", aspect="auto")
    coloured = None
    for index in range(count):
        row, column = divmod(index, _COLUMNS)
        left = _LABEL + column * (_CELL + _GAP)
        for step, (name, panel) in enumerate(panels.items()):
            top = row * band + _TITLE + step * (cell_height + _GAP)
            axes = add_axes(left, top, _CELL, cell_height)
            axes.set(xticks=[], yticks=[])
            for spine in axes.spines.values():
                spine.set(visible=bool(wrong[index]), color=_WRONG, linewidth=2.5)
            if panel is not None:
                coloured = axes.imshow(panel[index], **scale)
            else:
                picture = images[index]
                if name == "overlay":
                    picture = overlay(picture, attention[index], value_range=(low, high))
                axes.imshow(
                    np.broadcast_to(picture, (height, width, 3)),
                    interpolation="nearest",
                    aspect="auto",
                )
                box = None if boxes is None else np.asarray(boxes)[index]
                if box is not None and box[2] > box[0] and box[3] > box[1]:
                    corner = (box[1] * width - 0.5, box[0] * height - 0.5)
                    extent = ((box[3] - box[1]) * width, (box[2] - box[0]) * height)
                    # White on black shows on any image.
                    for colour, line in (("black", 2.4), ("white", 1.1)):
                        axes.add_patch(Rectangle(corner, *extent, fill=False, color=colour, linewidth=line))
            if step == 0 and texts is not None:
                longest = max(map(len, texts[index].split("\n")))
                axes.set_title(
                    texts[index],
                    fontsize=8 * min(1, 16 / max(longest, 1)),  # 16 letters of 8 points fit.
                    pad=4,
                    color=_WRONG if wrong[index] else _TEXT,
                    fontweight="bold" if wrong[index] else "normal",
                    parse_math=False,  # A class name may hold a dollar sign.
                )
            if column == 0:
                axes.set_ylabel(name, fontsize=9, color=_TEXT, rotation=0, ha="right", va="center", labelpad=6)

    bar_top = _TITLE + cell_height + _GAP
    bar_height = (cell_height + _GAP) * (2 if quantized is not None else 1) - _GAP
    bar = figure.colorbar(coloured, cax=add_axes(size[0] - _BAR + 0.2, bar_top, 0.14, bar_height))
    bar.ax.tick_params(labelsize=8, colors=_TEXT)
    bar.outline.set_visible(False)
    if quantized is not None:
        levels = np.unique(quantized)
        bar.ax.hlines(levels, 0, 0.4, transform=bar.ax.get_yaxis_transform(),
                      colors="white", linewidths=1.0)  # fmt: skip
        noun = "level" if len(levels) == 1 else "levels"
        bar.ax.set_xlabel(f"{len(levels)} {noun}\nin use", fontsize=8, color=_TEXT, labelpad=5)
    return figure


def training_curves(history: Mapping[str, Sequence[float]], label_entropy: float | None = None):
    """Draws the course of a training: accuracy, cross-entropy, rate, and the information plane.

    Names in the history, each with a "val_" twin or without: "accuracy"; "cross_entropy_bits" or
    "cross_entropy", in bits; "rate_bits" or "rate", in bits; "label_information_bits",
    "label_information" or "information_label", the lower bound on I(Z;Y) in bits. Panels without
    data are left out. "epoch" numbers the epochs; 1, 2, .. otherwise. None and NaN leave gaps.

    Args:
        history: Name to one value per epoch.
        label_entropy: H(Y) in bits. Where the history has no label information, H(Y) minus the
            cross-entropy takes its place in the information plane.

    Returns:
        A `matplotlib.figure.Figure`.

    Raises:
        ValueError: The history has none of the names, or lists of different lengths.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    used = {
        split + name
        for names in (*(panel[2] for panel in _PANELS), _LABEL_INFORMATION)
        for name in names
        for split in ("", "val_")
    }
    curves = {name: np.asarray(history[name], float) for name in history if name in used}
    if not curves:
        raise ValueError(
            f"The history holds nothing to draw, such as 'accuracy' or 'rate_bits'. Received: history={sorted(history)}"
        )
    if "epoch" in history:
        epochs = np.asarray(history["epoch"], float)
    else:
        epochs = np.arange(1.0, 1 + max(map(len, curves.values())))
    lengths = {name: len(values) for name, values in curves.items()}
    if set(lengths.values()) != {len(epochs)}:
        raise ValueError(f"All lists must have one value per epoch, {len(epochs)}. Received: lengths={lengths}")

    def find(names, split):
        return next((curves[split + name] for name in names if split + name in curves), None)

    splits = (("", "training", _TRAINING, "o"), ("val_", "validation", _VALIDATION, "s"))
    panels = [panel for panel in _PANELS if any(find(panel[2], split) is not None for split, *_ in splits)]
    planes = []
    for split, name, colour, marker in splits:
        rate, information = find(_PANELS[2][2], split), find(_LABEL_INFORMATION, split)
        cross_entropy = find(_PANELS[1][2], split)
        if information is None and label_entropy is not None and cross_entropy is not None:
            information = label_entropy - cross_entropy
        if rate is not None and information is not None:
            planes.append((rate, information, name, colour, marker))

    count = len(panels) + bool(planes)
    rows, columns = math.ceil(count / 2), min(count, 2)
    figure = Figure(figsize=(4.4 * columns, 3.1 * rows), dpi=120, facecolor="white", layout="constrained")
    axes = iter(figure.subplots(rows, columns, squeeze=False).ravel())
    # Marks on every epoch of a long training would hide the line.
    marks = {"markersize": 4, "linewidth": 1.6, "markevery": max(1, len(epochs) // 20)}
    for title, unit, names in panels:
        panel = next(axes)
        for split, name, colour, marker in splits:
            values = find(names, split)
            if values is not None:
                panel.plot(epochs, values, color=colour, marker=marker, label=name, **marks)
        panel.set_title(title, loc="left", fontsize=10, color=_TEXT)
        panel.set_xlabel("epoch", fontsize=9, color=_TEXT)
        panel.set_ylabel(unit, fontsize=9, color=_TEXT)
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
        _finish(panel)
    if planes:
        panel = next(axes)
        for rate, information, name, colour, marker in planes:
            panel.plot(rate, information, color=colour, marker=marker, label=name, **marks)
        # The ends of one curve tell the direction; those of a second would lie on top of them.
        for epoch in dict.fromkeys((0, len(epochs) - 1)):
            if np.isfinite(rate[epoch]) and np.isfinite(information[epoch]):
                panel.annotate(
                    f"epoch {epochs[epoch]:g}",
                    (rate[epoch], information[epoch]),
                    textcoords="offset points",
                    xytext=(6, 6),
                    fontsize=8,
                    color=_TEXT,
                )
        panel.margins(0.15)
        panel.set_title("Information plane", loc="left", fontsize=10, color=_TEXT)
        panel.set_xlabel("upper bound on I(Z;X), bits", fontsize=9, color=_TEXT)
        panel.set_ylabel("lower bound on I(Z;Y), bits", fontsize=9, color=_TEXT)
        _finish(panel)
    for panel in axes:
        panel.remove()
    return figure


def save_figure(figure, path: str | os.PathLike) -> None:
    """Writes a figure, whole or not at all, in the format that the ending of `path` names.

    Args:
        figure: a `matplotlib.figure.Figure`.
        path: a local path, or one on a file system that `tf.io.gfile` knows, such as gs://.

    Raises:
        ValueError: matplotlib does not know the ending.
    """
    endings = figure.canvas.get_supported_filetypes()
    ending = files.path(path).suffix[1:].lower()
    if ending not in endings:
        raise ValueError(f"A figure is written as one of {', '.join(sorted(endings))}. Received: path={str(path)!r}")
    with files.replacing(path) as temporary:
        figure.savefig(temporary, format=ending, dpi=figure.dpi)


def figure_to_array(figure) -> np.ndarray:
    """Renders a figure to uint8 RGB, (H, W, 3), as image summaries take it."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.array(canvas.buffer_rgba())[..., :3]


def _titles(count, labels, predictions, class_names):
    if labels is None and predictions is None:
        return None

    def named(index):
        return str(index) if class_names is None else str(class_names[int(index)])

    texts = []
    for i in range(count):
        if labels is None:
            texts.append(f"predicted {named(predictions[i])}")
        elif predictions is None:
            texts.append(f"true {named(labels[i])}")
        elif labels[i] == predictions[i]:
            texts.append(f"right: {named(labels[i])}")
        else:
            texts.append(f"wrong: {named(predictions[i])}\ntrue: {named(labels[i])}")
    return texts


def _shortened(text: str) -> str:
    # Matplotlib cannot draw what stands for the bytes of a file's name that are not UTF-8.
    lines = text.encode(errors="backslashreplace").decode().split("\n")
    return "\n".join(line if len(line) <= _LETTERS else line[: _LETTERS - 1] + "…" for line in lines)


def _finish(axes) -> None:
    axes.grid(color="#DDDDDD", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8, colors=_TEXT)
    # Above the curves, where it hides none: the search for the "best" place among many points is slow, and warns of it.
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, borderaxespad=0.2, fontsize=8, frameon=False)


def _check_images(images, name: str, rank: int) -> np.ndarray:
    images = np.asarray(images)
    if images.ndim != rank or images.shape[-1] not in (1, 3) or 0 in images.shape[-3:]:
        axes = "(B, H, W, 1 or 3)" if rank == 4 else "(H, W, 1 or 3)"
        raise ValueError(f"{name} must have shape {axes}. Received: shape={images.shape}")
    if images.dtype != np.uint8:
        raise TypeError(f"{name} must be uint8 in 0..255, as before normalisation. Received: dtype={images.dtype}")
    return images


def _check_maps(values, name: str, rank: int, count: int | None = None) -> np.ndarray:
    values = np.asarray(values).astype(np.float64)
    if values.ndim != rank or 0 in values.shape[-2:] or count not in (None, len(values)):
        axes = "(h, w)" if count is None else f"({count}, h, w)"
        raise ValueError(f"{name} must have shape {axes}. Received: shape={values.shape}")
    finite = np.isfinite(values)
    if not finite.all():
        bad = np.count_nonzero(~finite.all(axis=(-2, -1)))
        whole = "the map" if count is None else f"{bad} of {count} maps"
        raise ValueError(
            f"{name} holds NaN or infinity in {whole}. "
            f"Received: values={np.count_nonzero(~finite)} of {values.size} not finite"
        )
    return values


def _check_range(value_range, values) -> tuple[float, float]:
    if value_range is None:
        return float(values.min()), float(values.max())
    low, high = map(float, value_range)
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise ValueError(f"value_range must be (low, high) with low < high. Received: value_range={value_range}")
    return low, high

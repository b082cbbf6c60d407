"""Charts as SVG for a page: drawn by matplotlib, coloured by the page."""

import dataclasses
import io
import re
import textwrap
import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping, Sequence

import numpy as np

from aib_tf.evaluation.chart import Chart, Line

# Okabe-Ito without yellow, which light paper swallows, and without black, which is the text's. The page may set each
# anew, as --series-1 and so on: it has other lightness in the dark.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#777777")
_DASHES = ("none", "6 2.5", "1.5 2", "6 2 1.5 2")
# Colours that stand for those of the page.
_INK, _RULE = "#010203", "#040506"
_PAGE = {_INK: "currentColor", _RULE: "var(--rule, #ddd)"} | {
    colour: f"var(--series-{number}, {colour})" for number, colour in enumerate(COLOURS, start=1)
}
# CSS pixels at the size that it is drawn for; 72 to matplotlib's inch make a point a pixel.
_SIZE, _SIZE_OF_MANY = (360, 240), (264, 200)
# With more points than this, marks would hide the line; with more lines, they and bands would hide each other.
_MARKED_POINTS, _MARKED_LINES, _BANDS = 24, 6, 3


@dataclasses.dataclass(frozen=True)
class Series:
    """One entry of a legend, and how its lines look.

    Attributes:
        label: What it is.
        number: Its place, from 0, in the list of looks.
    """

    label: str
    number: int

    @property
    def colour(self) -> str:
        """A colour as CSS takes it."""
        return _PAGE[self._plain_colour]

    @property
    def dash(self) -> str:
        """Value of stroke-dasharray. Colours come back after seven, with other dashes."""
        return _DASHES[(self.number // len(COLOURS)) % len(_DASHES)]

    @property
    def _plain_colour(self):
        return COLOURS[self.number % len(COLOURS)]


@dataclasses.dataclass(frozen=True)
class Panel:
    """One drawing.

    Attributes:
        title: What distinguishes it from the others of its figure; empty where it is the only one.
        svg: The drawing, as an <svg> element.
    """

    title: str
    svg: str


@dataclasses.dataclass(frozen=True)
class Figure:
    """The same chart of one or more runs.

    Attributes:
        title: What is drawn.
        series: The legend; empty where there is nothing to tell apart.
        panels: One, or one for each line of the chart where there are several runs as well.
        note: The run, where only one of several has the chart, or what else has to be said.
    """

    title: str
    series: Sequence[Series]
    panels: Sequence[Panel]
    note: str = ""


def figure(identifier: str, title: str, charts: Mapping[str, Chart], groups: Mapping[str, str], label) -> Figure:
    """Draws one chart of all runs that have it.

    Of one run, all lines share a panel. Of several, each line has its panel, in which the runs lie over one another;
    runs of one group share a colour. Histograms would hide each other: of runs of one group, their mean is drawn.

    Args:
        identifier: Unique in the page; letters, digits and hyphens.
        title: What is drawn.
        charts: Name of the run to its chart.
        groups: Name of the run to the name of its group.
        label: Function from the name of a line to what is shown.

    Returns:
        A `Figure`.
    """
    first = next(iter(charts.values()))
    names = list(dict.fromkeys(name for chart in charts.values() for name in chart.lines))
    note = ""
    colours = list(dict.fromkeys(groups.values()))
    if len(charts) == 1:
        (run,) = charts
        note = run if len(groups) > 1 else ""
        # Alone, a line of one of several runs has the colour that the run has everywhere.
        number = colours.index(groups[run]) if len(names) == 1 else 0
        series = {name: Series(label(name), number + place) for place, name in enumerate(names)}
        panels = {"": [(series[name], line) for name, line in first.lines.items()]}
    else:
        series = {group: Series(group, number) for number, group in enumerate(colours)}
        # A group that lacks the chart keeps its colour, and needs no place in the legend.
        series = {group: one for group, one in series.items() if group in {groups[run] for run in charts}}
        panels = {}
        for name in names:
            lines = [(groups[run], chart.lines[name]) for run, chart in charts.items() if name in chart.lines]
            if first.kind == "bar" and len({group for group, _ in lines}) < len(lines):
                lines = _means(lines)
                note = "mean of each model's runs"
            panels[label(name) if len(names) > 1 else ""] = [(series[group], line) for group, line in lines]
    lines = [line for panel in panels.values() for _, line in panel]
    style = _Style(*_limits(lines, first), _SIZE if len(panels) == 1 else _SIZE_OF_MANY, max(map(len, panels.values())))
    drawn = [
        Panel(panel, _draw(f"{identifier}-{number}", f"{title}: {panel}" if panel else title, lines, first, style))
        for number, (panel, lines) in enumerate(panels.items())
    ]
    return Figure(title, list(series.values()) if len(series) > 1 else [], drawn, note)


@dataclasses.dataclass(frozen=True)
class _Style:
    """What all panels of a figure have in common: limits and size, and the most lines that one of them has."""

    x_limits: tuple[float, float]
    y_limits: tuple[float, float]
    size: tuple[int, int]
    lines: int


def _means(lines):
    """Of each group, the mean of its lines; all of them where their x differ."""
    found = []
    for group in dict.fromkeys(group for group, _ in lines):
        members = [line for other, line in lines if other == group]
        if all(line.x == members[0].x for line in members):
            members = [Line(members[0].x, np.mean([line.y for line in members], axis=0))]
        found += [(group, line) for line in members]
    return found


def _draw(identifier, title, lines, chart, style):
    from matplotlib import rc_context
    from matplotlib.figure import Figure as Drawing

    drawing = Drawing(figsize=[side / 72 for side in style.size], dpi=72, layout="constrained")
    axes = drawing.add_subplot()
    if chart.diagonal:
        axes.axline((0, 0), slope=1, color=_INK, alpha=0.45, linewidth=1, dashes=(3, 3))
    for place, (series, line) in enumerate(lines):
        x, y = np.asarray(line.x), np.asarray(line.y)
        if not len(x):
            continue
        colour = series._plain_colour
        dashes = "solid" if series.dash == "none" else (0, [float(part) for part in series.dash.split()])
        look = {"color": colour, "linewidth": 1.8 if style.lines <= _MARKED_LINES else 1.1, "linestyle": dashes}
        ends = None if line.low is None else np.clip([y - line.low, np.asarray(line.high) - y], 0, None)
        if chart.kind == "bar":
            if style.lines == 1:
                axes.bar(x, y, width=np.diff(_edges(x)) * 0.9, color=colour)
            else:
                axes.stairs(y, _edges(x), **look)
            if ends is not None and style.lines == 1:
                axes.errorbar(x, y, ends, fmt="none", ecolor=_INK, elinewidth=1, alpha=0.7)
            continue
        is_marked = len(x) <= _MARKED_POINTS and style.lines <= _MARKED_LINES
        marks = {"marker": "o", "markersize": 3.5} if is_marked or len(x) == 1 else {}
        axes.plot(x, y, **look, **marks, zorder=3 - place / 100)
        if ends is not None and style.lines <= _BANDS:
            if len(x) > 1:
                axes.fill_between(x, line.low, line.high, color=colour, alpha=0.16, linewidth=0)
            else:
                axes.errorbar(x, y, ends, fmt="none", ecolor=colour, elinewidth=1.2)
    axes.set(xlim=style.x_limits, ylim=style.y_limits)
    axes.grid(axis="y", color=_RULE, linewidth=1)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set(color=_INK, alpha=0.6)
    axes.tick_params(labelsize=11, colors=_INK, length=0, pad=5)
    text = {"fontsize": 11.5, "color": _INK, "parse_math": False}
    letters = style.size[0] // 7
    axes.set_xlabel("\n".join(textwrap.wrap(chart.x_label, letters)), labelpad=6, **text)
    # Above the axis it can be read without turning the head, and takes no width.
    axes.set_title("\n".join(textwrap.wrap(chart.y_label, letters)), loc="left", pad=9, **text)
    buffer = io.BytesIO()
    # The only way to these two settings; the salt makes the same drawing give the same text.
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "aib_tf"}):
        drawing.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return _for_page(buffer.getvalue(), identifier, title)


def _for_page(svg: bytes, identifier: str, title: str) -> str:
    """An SVG file of matplotlib as an element of a page: its ids unique, its colours and letters the page's."""
    root = ElementTree.fromstring(svg)
    for element in root.iter():
        # An element of HTML needs no namespaces.
        element.tag = element.tag.rpartition("}")[2]
        for name in [name for name in element.attrib if name.startswith("{")]:
            element.set(name.rpartition("}")[2], element.attrib.pop(name))
        # Its style sheet would be the whole page's.
        for child in [child for child in element if child.tag.endswith(("}metadata", "}style"))]:
            element.remove(child)
    used = set(re.findall(r"(?:url\(|href=\")#([^)\"]+)", ElementTree.tostring(root, encoding="unicode")))
    for element in root.iter():
        name = element.attrib.pop("id", None)
        if name in used:
            element.set("id", f"{identifier}-{name}")
        for key in ("href", "clip-path"):
            if key in element.attrib:
                element.set(key, element.get(key).replace("#", f"#{identifier}-"))
        if element.get("transform", "").startswith("rotate(-0 "):
            del element.attrib["transform"]
        if "style" in element.attrib:
            element.set("style", _style(element.get("style")))
    for name in ("width", "height", "version"):
        del root.attrib[name]
    root.attrib |= {"role": "img", "aria-labelledby": f"{identifier}-title"}
    heading = ElementTree.Element("title", {"id": f"{identifier}-title"})
    heading.text = title
    root.insert(0, heading)
    return re.sub(r"\s*\n\s*", "\n", ElementTree.tostring(root, encoding="unicode"))


def _style(style: str) -> str:
    kept = {}
    for part in style.split(";"):
        name, _, value = (piece.strip() for piece in part.partition(":"))
        if name == "font":  # size and family in one, as older matplotlib writes it
            name, value = "font-size", re.search(r"[\d.]+px", value)[0]
        if name and name != "font-family":
            kept[name] = _PAGE.get(value, value)
    return "; ".join(f"{name}: {value}" for name, value in kept.items())


def _edges(x):
    """Edges of the bins that x are the middles of."""
    if len(x) == 1:
        return np.array([x[0] - 0.5, x[0] + 0.5])
    middles = (x[1:] + x[:-1]) / 2
    return np.concatenate([[2 * x[0] - middles[0]], middles, [2 * x[-1] - middles[-1]]])


def _limits(lines, chart):
    """The axes' ends, common to all panels, so that they compare."""
    bars = chart.kind == "bar"
    x = np.concatenate([_edges(np.asarray(line.x)) if bars else line.x for line in lines if line.x] or [[0, 1]])
    y = [line.y for line in lines]
    y += [end for line in lines for end in (line.low, line.high) if end is not None]
    y = np.concatenate([[0.0], *y] if bars else y)
    if chart.diagonal:
        x, y = np.append(x, [0, 1]), np.append(y, [0, 1])
    return _padded(x, 0.03), _padded(y, 0.05, floor=0.0 if bars else None)


def _padded(values, share, floor=None):
    values = values[np.isfinite(values)]
    low, high = (values.min(), values.max()) if len(values) else (0.0, 1.0)
    if low == high:
        low, high = low - 0.5, high + 0.5
    pad = share * (high - low)
    return (low if floor is not None and low >= floor else low - pad), high + pad

"""The tutorial runs, what the pages link to is there, and examples in docstrings are true."""

import doctest
import functools
import importlib
import importlib.util
import json
import re
import urllib.parse
from pathlib import Path

import keras
import numpy as np
import pytest

import aib_tf

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOK = ROOT / "docs" / "tutorial.ipynb"
PAGES = [
    "README.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "custom_ops/README.md",
    "docs/tutorial.ipynb",
    *sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").rglob("*.md")),
]

_FENCE = re.compile(r"^(```+).*?^\1 *$", re.DOTALL | re.MULTILINE)
_CODE_SPAN = re.compile(r"(`+)[^`].*?\1", re.DOTALL)
_LINK = re.compile(r"\]\(([^()\s]+)\)|^\[[^\]]+\]: (\S+)|\b(?:href|src)=\"([^\"]+)\"", re.MULTILINE)


@functools.cache
def prose(path):
    """The Markdown of a page or a notebook, without blocks of code."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".ipynb":
        cells = json.loads(text)["cells"]
        text = "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    return _FENCE.sub("", text)


@functools.cache
def anchors(path):
    """The anchors that GitHub gives the headings of a page."""
    found = set()
    for heading in re.findall(r"^#{1,6} (.+?) *$", prose(path), re.MULTILINE):
        text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        slug = re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")
        used = [other for other in found if re.fullmatch(re.escape(slug) + r"(-\d+)?", other)]
        found.add(f"{slug}-{len(used)}" if used else slug)
    return found


def broken_links(page):
    """The links of a page that lead nowhere; of those to other sites, those that are no address."""
    broken = []
    for link in map("".join, _LINK.findall(_CODE_SPAN.sub("", prose(page)))):
        address = urllib.parse.urlsplit(link)
        if address.scheme or address.netloc:
            if address.scheme not in ("http", "https") or "." not in address.netloc:
                broken.append(link)
            continue
        target = (page.parent / urllib.parse.unquote(address.path)).resolve() if address.path else page
        inside = target.is_relative_to(ROOT) or not page.is_relative_to(ROOT)
        marks = target.suffix in (".md", ".ipynb") and target.exists()
        if not (inside and target.exists()) or (address.fragment and marks and address.fragment not in anchors(target)):
            broken.append(link)
    return broken


@pytest.mark.parametrize("page", PAGES)
def test_every_link_of_a_page_leads_somewhere(page):
    assert broken_links(ROOT / page) == []


def test_links_that_lead_nowhere_are_found(tmp_path):
    (tmp_path / "other.md").write_text("# On `two` devices, and more\n\n## Twice\n\n## Twice\n")
    page = tmp_path / "page.md"
    page.write_text(
        "# Here\n\n[right](other.md#on-two-devices-and-more) [right](#here) [right](other.md#twice-1) `[no](link.md)`\n"
        "[`right`](https://example.org/a#b) [wrong](gone.md) [wrong](other.md#gone) ![wrong](gone.png)\n"
        "[wrong](#gone) [wrong](htps://example.org) [wrong](https://nowhere) [wrong](other.md#twice-2)\n"
        "\n```\n[no](link.md)\n```\n"
    )
    assert broken_links(page) == [
        "gone.md",
        "other.md#gone",
        "gone.png",
        "#gone",
        "htps://example.org",
        "https://nowhere",
        "other.md#twice-2",
    ]


def code_cells():
    return [cell for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]


def test_the_tutorial_holds_what_one_whole_run_showed():
    cells = code_cells()
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    assert {output["output_type"] for output in outputs} == {"display_data", "execute_result", "stream"}
    assert {output["name"] for output in outputs if "name" in output} == {"stdout"}
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 4
    texts = "".join("".join(output.get("text", output.get("data", {}).get("text/plain", ""))) for output in outputs)
    assert "about the label" in texts
    assert re.findall(r"(?:^|[\s'\"=(])/\w+/|Warning|0x[0-9a-f]{6,}", texts) == []  # of one machine only
    assert NOTEBOOK.stat().st_size < 500_000


def test_the_tutorial_runs_from_top_to_bottom(tmp_path, monkeypatch):
    """Its own assertions hold: on accuracy, information, localisation, anchors, beta, saving and export."""
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    specification = importlib.util.spec_from_file_location("run_tutorial", NOTEBOOK.parent / "run_tutorial.py")
    run_tutorial = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(run_tutorial)
    cells = [cell for cell in run_tutorial.executed(NOTEBOOK).cells if cell.cell_type == "code"]
    shown = [[output["output_type"] for output in cell["outputs"]] for cell in cells]
    assert shown == [[output["output_type"] for output in cell["outputs"]] for cell in code_cells()]


class _AnyShape(doctest.OutputChecker):
    """Examples show shapes as tuples; TensorFlow prints them in its own way."""

    def check_output(self, want, got, optionflags):
        return super().check_output(want, re.sub(r"TensorShape\(\[(.*)\]\)", r"(\1)", got), optionflags)


@pytest.mark.parametrize(
    "module",
    [
        "aib_tf.losses",
        "aib_tf.layers.anchor_quantizer",
        "aib_tf.layers.gaussian_bottleneck",
        "aib_tf.layers.pay_attention",
        "aib_tf.layers.variational_attention",
    ],
)
def test_examples_in_docstrings_give_what_they_show(module):
    names = {"aib_tf": aib_tf, "keras": keras, "np": np}
    examples = doctest.DocTestFinder().find(importlib.import_module(module), extraglobs=names)
    runner = doctest.DocTestRunner(_AnyShape(), verbose=False)
    for example in examples:
        runner.run(example)
    assert runner.tries > 0
    assert runner.failures == 0

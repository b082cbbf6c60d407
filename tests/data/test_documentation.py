"""The examples of docs/data.md run, and its tables agree with the table of data sets."""

import pathlib
import re

import pytest

from aib_tf import data

DOCUMENT = pathlib.Path(__file__).parents[2] / "docs" / "data.md"


@pytest.fixture(scope="module")
def text():
    return DOCUMENT.read_text(encoding="utf-8")


def test_the_examples_run_and_print_what_they_say(text, capsys):
    before = dict(data.DATASETS)
    examples = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(examples) == 2
    try:
        for example in examples:
            exec(compile(example, str(DOCUMENT), "exec"), {})
        assert data.get("tf_flowers").resize == (256, 256)
    finally:
        data.DATASETS.clear()
        data.DATASETS.update(before)
    promised = re.findall(r"print\(.*\)  # (.*)", "".join(examples))
    assert capsys.readouterr().out.splitlines() == promised


def test_every_data_set_is_listed_with_its_shape_and_classes(text):
    for name, info in data.DATASETS.items():
        row = next(line for line in text.splitlines() if line.startswith(f"| `{name}` |"))
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        others = ", ".join(field for field in info.fields if field not in ("image", "label"))
        assert cells[3:] == ["×".join(map(str, info.image_shape)), str(info.classes), others]


def test_the_statistics_that_are_listed_are_those_of_the_table(text):
    listed = text[text.index("| name | mean |") : text.index("Statistics are of pixels")]
    for name, info in data.DATASETS.items():
        row = next(line for line in listed.splitlines() if f"`{name.removesuffix('_extra')}`" in line)
        for values in (info.mean, info.stddev):
            assert f"| {', '.join(map(str, values))} |" in row

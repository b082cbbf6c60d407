"""The README's examples run as they stand, and what it names exists."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def test_python_examples_run_in_the_order_of_the_page(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)  # one of them saves a model
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "data"))
    names = {}
    for example in re.findall(r"```python\n(.*?)```", README, re.DOTALL):
        exec(compile(example, "README.md", "exec"), names)
    assert len(names["history"].history["rate_bits"]) == 2
    assert names["seen"]["attention_mean"].shape == (64, 16, 16)
    assert (tmp_path / "digits.keras").exists()
    assert names["found"]["pointing_box_attention"].images == 100
    assert "[0.  0.5 1. ]" in capsys.readouterr().out


PAGES = [
    "README.md",
    "CONTRIBUTING.md",
    "custom_ops/README.md",
    "docs/addons.md",
    "docs/distributed.md",
    "docs/evaluation.md",
    "docs/method.md",
    "docs/pytorch.md",
    "docs/serving.md",
    "docs/results/README.md",
    "docs/results/distribution.md",
    "docs/results/nearest_anchor.md",
]


@pytest.mark.parametrize("page", PAGES)
def test_what_a_page_names_exists(page):
    text = (ROOT / page).read_text()
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^ +make ([a-z-]+)", text, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    for link in re.findall(r"\]\(([^)#]+)\)", text):
        if not link.startswith("http"):
            assert ((ROOT / page).parent / link).exists(), link
    for file in re.findall(r"\b(?:configs|scripts|benchmarks)/[\w./-]+\.\w+", text):
        assert (ROOT / file).exists(), file


def test_flags_in_the_readme_are_flags_of_the_scripts():
    from aib_tf.config import settings

    known = {flag for _, flag, _ in settings()} | {
        "flagfile",
        "output_dir",
        "run",
        "report",
        "images",
        "logdir",
        "help",
        "samples",
        "checkpoint",
        "keras",
        "output",
        "server",
        "workers",
        "file",
        "jobs",
    }
    assert set(re.findall(r"--([a-z_]+)", README)) <= known

"""Finds the numbers of the authors' PyTorch code, which are not part of this repository."""

import importlib.util
import json
import pathlib

import numpy as np
import pytest

FOLDER = pathlib.Path(__file__).resolve().parents[2] / "shared" / "parity"


def load(name):
    """Returns the arrays of a case and the module that rebuilds its weights, or skips the test."""
    if not FOLDER.is_dir():
        pytest.skip(f"the parity numbers of the PyTorch code are not on this machine ({FOLDER} is absent)")
    module_spec = importlib.util.spec_from_file_location("parity_recipe", FOLDER / "recipe.py")
    recipe = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(recipe)
    with np.load(FOLDER / f"{name}.npz") as file:
        return dict(file), recipe


def spec(name):
    """Returns the names, shapes and kinds of a case's state dict."""
    return json.loads((FOLDER / f"{name}.spec.json").read_text())

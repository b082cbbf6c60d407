"""One tiny drawing, prepared once, for all tests of this folder."""

import pytest

from aib_tf import data

TINY = "cluttered_digits/train60_validation20_test20_seed3"


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    data.num_examples(TINY, "train", folder)  # Draws it.
    return folder

"""Runs on pictures of a folder, some of which cannot be used."""

import json

import numpy as np
import pytest
from PIL import Image

from aib_tf import data, training


@pytest.fixture
def pictures(tmp_path):
    random = np.random.default_rng(0)
    for split, count in (("train", 8), ("validation", 3), ("test", 3)):
        for name in ("ant", "bee"):
            folder = tmp_path / "animals" / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = random.integers(0, 256, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{number}.png")
    for split in ("train", "test"):
        (tmp_path / "animals" / split / "bee" / "1.png").write_bytes(b"no picture")
    return tmp_path


def test_a_run_stops_at_a_bad_picture_or_goes_on_without_it(pictures, tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(pictures.parent)
    flags = {"dataset": "image_folder_32/animals", "data_dir": pictures.name, "epochs": 1, "batch_size": 5}
    with pytest.raises(data.BadExampleError, match=r"1 of 16 .*train/bee/1\.png: it cannot be decoded"):
        training.fit(tiny(**flags), tmp_path / "run", verbose=0)

    # In the same folder, so that what was trained up to there is not lost.
    history = training.fit(tiny(**flags, bad_examples="skip"), tmp_path / "run", verbose=0)
    assert len(history["loss"]) == 1
    # The folder of a run is read from anywhere.
    monkeypatch.chdir("/")
    run = training.Run(tmp_path / "run")
    images = run.config.data
    assert (images.name, images.data_dir) == ("image_folder_32/animals", str(pictures))
    assert data.get(images.name, images.data_dir).class_names == ("ant", "bee")
    measured = [
        batch["id"]
        for batch in data.load(
            images.name, "test", 8, images.data_dir, fields=("id",), bad_examples=images.bad_examples
        )
    ]
    assert sum(len(ids) for ids in measured) == 5
    assert json.loads(run.metrics_file.read_text())["split"] == "test"

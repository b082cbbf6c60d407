"""scripts/visualize.py in this process, with a model that keeps what it was shown."""

import numpy as np
import pytest
from PIL import Image

from aib_tf import data
from tests.scripts import in_process


@pytest.fixture(scope="module")
def script():
    return in_process.load("visualize")


class Watcher:
    attention_names = ("attention_mean",)

    def explain(self, images):
        self.images = images
        return {"attention_mean": np.ones((len(images), 4, 4)), "probabilities": np.full((len(images), 2), 0.5)}


@pytest.mark.parametrize("dataset", ["image_folder/pets", "image_folder_32/pets"])
def test_a_picture_is_shown_to_the_model_as_the_evaluation_shows_it(dataset, script, tmp_path):
    for split in ("train", "validation", "test"):
        for number, name in enumerate(("cat", "dog")):
            folder = tmp_path / "pets" / split / name
            folder.mkdir(parents=True)
            pixels = np.random.default_rng(number).integers(0, 256, (60, 150, 3), np.uint8)
            Image.fromarray(pixels).resize((300, 120)).save(folder / "1.png")
    ((expected, labels),) = data.load(dataset, "test", 2, tmp_path)
    files = [tmp_path / "pets" / "test" / ("cat", "dog")[label] / "1.png" for label in labels]
    model = Watcher()
    script.draw_pictures(model, data.get(dataset, tmp_path), files, tmp_path / "out.png")
    np.testing.assert_allclose(model.images, expected, atol=1e-6)
    assert (tmp_path / "out.png").exists()

import pytest

from aib_tf import data
from aib_tf.config import Config

TINY = "cluttered_digits/train96_validation40_test40_seed0"


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    data.num_examples(TINY, "train", folder)  # draws it
    return str(folder)


@pytest.fixture
def tiny(data_dir):
    """Makes the config of a run of a few seconds, from flags."""

    def tiny(**flags):
        return Config.from_flat(
            {
                "dataset": TINY,
                "data_dir": data_dir,
                "model": "vgg_aib_qt",
                "width": 0.05,
                "latent_dim": 8,
                "num_anchors": 5,
                "batch_size": 16,
                "epochs": 2,
                "beta_warmup_epochs": 1.0,
                **flags,
            }
        )

    return tiny

"""Archives that somebody has put where TFDS looks for them, for machines without a network."""

import dataclasses
import hashlib
import urllib.error
import urllib.request

import numpy as np
import pytest
import tensorflow_datasets as tfds
from tensorflow_datasets.core.download.checksums import UrlInfo

from aib_tf import data

ADDRESS = "https://example.org/files/stand-in-1.bin?download=1"
CONTENT = bytes(range(4))


class StandInOfOneArchive(tfds.core.GeneratorBasedBuilder):
    """Grey images, one for each byte of an archive."""

    VERSION = tfds.core.Version("1.0.0")
    url_infos = {ADDRESS: UrlInfo(len(CONTENT), hashlib.sha256(CONTENT).hexdigest(), "stand-in.bin")}

    def _info(self):
        features = {"image": tfds.features.Image(shape=(8, 8, 3)), "label": tfds.features.ClassLabel(num_classes=2)}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        content = dl_manager.download(ADDRESS).read_bytes()
        return {split: self._generate_examples(content) for split in ("train", "test")}

    def _generate_examples(self, content):
        for number, value in enumerate(content):
            yield number, {"image": np.full((8, 8, 3), value, np.uint8), "label": number % 2}


@pytest.fixture
def name(monkeypatch):
    def no_network(request, **options):
        raise urllib.error.URLError("no route")

    monkeypatch.setattr(urllib.request, "urlopen", no_network)
    info = dataclasses.replace(
        data.get("cifar10"),
        name=StandInOfOneArchive.name,
        builder=StandInOfOneArchive.name,
        image_shape=(8, 8, 3),
        classes=2,
        class_names=("even", "odd"),
        fields=("image", "label"),
        splits={split: split for split in ("train", "test")},
    )
    monkeypatch.setitem(data.DATASETS, info.name, info)
    return info.name


def test_an_archive_put_by_hand_is_used_without_a_network(name, tmp_path):
    folder = tmp_path / "downloads" / "manual"
    folder.mkdir(parents=True)
    (folder / "stand-in.bin").write_bytes(CONTENT)
    ((images, labels),) = data.load(name, "train", 4, tmp_path, normalize=False)
    assert sorted(images.numpy()[:, 0, 0, 0]) == list(CONTENT)
    assert sorted(labels.numpy()) == [0, 0, 1, 1]


def test_another_archive_of_that_name_is_refused_by_its_checksum(name, tmp_path):
    folder = tmp_path / "downloads" / "manual"
    folder.mkdir(parents=True)
    (folder / "stand-in.bin").write_bytes(CONTENT[::-1])
    with pytest.raises(data.DatasetUnavailableError, match=r"(?s)NonMatchingChecksumError.*stand-in\.bin.*Expected"):
        data.load(name, "train", 4, tmp_path)


def test_a_missing_archive_is_named_with_its_address_and_its_place(name, tmp_path):
    with pytest.raises(data.DatasetUnavailableError) as caught:
        data.load(name, "train", 4, tmp_path)
    message = str(caught.value)
    assert f"{ADDRESS} does not answer" in message and "no route" in message
    assert f"{ADDRESS}\n    as {tmp_path}/downloads/manual/stand-in.bin" in message
    assert not list(tmp_path.iterdir())

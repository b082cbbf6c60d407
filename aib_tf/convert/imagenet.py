"""Where the ImageNet weights come from that the papers' networks for CUB start with."""

import dataclasses
import hashlib
import os

import keras

from aib_tf.convert import names


@dataclasses.dataclass(frozen=True)
class ImageNetWeights:
    """torchvision's weights of a backbone.

    Attributes:
        url: the file; its name ends in the first digits of its SHA-256.
        prefixes: which of its arrays are the backbone's.
    """

    url: str
    prefixes: tuple[str, ...]


_SERVER = "https://download.pytorch.org/models"
IMAGENET = {
    "vgg16_cub": ImageNetWeights(f"{_SERVER}/vgg16-397923af.pth", ("features.",)),
    "wrn_50_2_cub": ImageNetWeights(
        f"{_SERVER}/wide_resnet50_2-95faca4d.pth", ("conv1", "bn1", "layer1.", "layer2.", "layer3.", "layer4.")
    ),
}


def of(model):
    """The `ImageNetWeights` for the backbone of a model.

    Raises:
        ValueError: if there are none.
    """
    architecture = names.architecture_of(model)
    if architecture not in IMAGENET:
        raise ValueError(
            f"ImageNet weights are for the backbones {', '.join(sorted(IMAGENET))}. "
            f"Received: model.name={getattr(model, 'name', model)!r}"
        )
    return IMAGENET[architecture]


def fetch_imagenet(model):
    """Downloads torchvision's ImageNet weights for the backbone of a model, unless they are in Keras's cache.

    Args:
        model: a model of VGG-16 or WideResNet-50-2.

    Returns:
        Path of the file.

    Raises:
        ValueError: if there are none for this model.
        FileNotFoundError: if the file is not there and cannot be fetched; the message says where it is looked for.
        OSError: if what was fetched has another checksum than its name says.
    """
    url = of(model).url
    file = os.path.basename(url)
    try:
        path = keras.utils.get_file(file, url, cache_subdir="models")
    except Exception as error:  # Keras raises a bare one
        raise FileNotFoundError(
            f"The ImageNet weights could not be fetched: {error}. Download {url} where there is a network, and give "
            "its path instead. Received: weights='imagenet'"
        ) from error
    digest = hashlib.sha256()
    with open(path, "rb") as opened:
        while chunk := opened.read(2**20):
            digest.update(chunk)
    if not digest.hexdigest().startswith(file.rpartition("-")[2].removesuffix(".pth")):
        os.remove(path)
        raise OSError(
            f"{path} was not what {url} names: its SHA-256 is {digest.hexdigest()}. It is removed; try again."
        )
    return path

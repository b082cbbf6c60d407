"""The table of data sets: what the pipeline has to know about each of them.

Another set that TFDS knows is one more entry; `resize` brings images of several sizes to one. Folders of pictures have
no entry: what there is to know is read from the folder.
"""

import dataclasses
import os
import re
from collections.abc import Mapping

from aib_tf.data import class_names, image_folder, locations
from aib_tf.validation import check_count


@dataclasses.dataclass(frozen=True)
class DatasetInfo:
    """A data set of labelled images.

    Args:
        name: the name users type, such as `"cifar10"`; with the configuration behind a slash if
            one was given, such as `"cluttered_digits/train600_validation100_test100_seed3"`; or an
            image folder, such as `"image_folder/pets"`.
        classes: number of classes, at least 2. Labels are 0 to classes - 1.
        image_shape: height, width and channels of an image as it is delivered.
        mean: mean of each channel over the pixels of the training images, pixels in [0, 1].
        stddev: standard deviation of the same.
        splits: `"train"`, `"validation"` and `"test"` -> a TFDS split instruction.
        class_names: one name a class, in the order of the labels.
        crop_padding: pixels of reflected border on each side before a random crop; 0: no border,
            and no crops unless there is `resize`.
        horizontal_flip: whether the mirror image of an image has the same label.
        fields: what can be read of an example.
        builder: name of the TFDS builder, with its configuration if the set has one.
        generated: whether it is generated on the spot, without a download. Only such a set takes a
            configuration from the name.
        module: Python module that registers the builder, if TFDS does not bring it along.
        resize: height and width that images of any size are resized to, without regard to their
            aspect ratio. Augmentation then takes a random window of `image_shape`; without it, it
            is the centre. None: all images have `image_shape`.
        crop_to_box: whether augmentation begins with a crop to the box of the object, before
            `resize`. Without augmentation images stay whole.
        features: field -> the TFDS feature it is read from, where that has another name.
        gray_images: whether there are photographs of one channel among those of three, as the set
            was published. They are delivered as three equal channels; elsewhere they are an error.
        mask_threshold: value from which a pixel of a stored mask belongs to the object.
        folder: of an image folder, its path, absolute or in the folder of all data sets.

    Raises:
        ValueError: if numbers do not fit together.
    """

    name: str
    classes: int
    image_shape: tuple[int, int, int]
    mean: tuple[float, ...]
    stddev: tuple[float, ...]
    splits: Mapping[str, str]
    class_names: tuple[str, ...]
    crop_padding: int
    horizontal_flip: bool
    fields: tuple[str, ...]
    builder: str
    generated: bool = False
    module: str | None = None
    resize: tuple[int, int] | None = None
    crop_to_box: bool = False
    features: Mapping[str, str] = dataclasses.field(default_factory=dict)
    gray_images: bool = False
    mask_threshold: int = 1
    folder: str | None = None

    def __post_init__(self):
        check_count("classes", self.classes, minimum=2)
        height, width, channels = self.image_shape
        resized = self.resize or (height, width)
        if len(resized) != 2 or resized[0] < height or resized[1] < width:
            raise ValueError(
                f"`resize` must be a height and width that hold image_shape, {self.image_shape}. "
                f"Received: resize={self.resize!r}"
            )
        # A border is reflected without repeating the edge: it must be narrower than the image.
        check_count("crop_padding", self.crop_padding, minimum=0, maximum=min(resized) - 1)
        for argument, length in (("mean", channels), ("stddev", channels)):
            value = getattr(self, argument)
            if len(value) != length:
                raise ValueError(
                    f"`{argument}` must have one number a channel, {length}. Received: {argument}={value!r}"
                )
        if len(self.class_names) != self.classes:
            raise ValueError(
                f"`class_names` must have one name a class, {self.classes}. Received: class_names={self.class_names!r}"
            )
        if self.crop_to_box and not (self.resize and self.has_boxes):
            raise ValueError(
                "`crop_to_box` needs a field bbox, and `resize`, since boxes differ in size. "
                f"Received: crop_to_box={self.crop_to_box!r}, resize={self.resize!r}, fields={self.fields!r}"
            )

    @property
    def has_boxes(self) -> bool:
        """Whether examples tell where the object is."""
        return "bbox" in self.fields


# For sets without validation images of their own: the last tenth of the training images.
_LAST_TENTH = {"train": "train[:90%]", "validation": "train[90%:]", "test": "test"}

# Those of CIFAR-100 as the released code of AIB has them, which takes them for CIFAR-10 too. They differ from other
# published roundings in the last digit, and let published weights be compared.
_CIFAR_MEAN = (0.5071, 0.4867, 0.4408)
_CIFAR_STDDEV = (0.2675, 0.2565, 0.2761)

# Those of ImageNet, which the weights that training may begin with have seen.
_IMAGENET_MEAN = (0.485, 0.456, 0.406)
_IMAGENET_STDDEV = (0.229, 0.224, 0.225)

_SVHN = DatasetInfo(
    name="svhn_cropped",
    classes=10,
    image_shape=(32, 32, 3),
    # Not those of the images: the values of the released code of AIB, pixels from -1 to 1.
    mean=(0.5, 0.5, 0.5),
    stddev=(0.5, 0.5, 0.5),
    splits=_LAST_TENTH,
    class_names=tuple("0123456789"),
    crop_padding=4,
    # A mirrored 2 is no digit. The released code mirrors house numbers all the same.
    horizontal_flip=False,
    fields=("image", "label", "id"),
    builder="svhn_cropped",
)

_TABLE = (
    DatasetInfo(
        name="cluttered_digits",
        classes=10,
        image_shape=(32, 32, 1),
        # Over all pixels of the 12,000 training images of the default configuration.
        mean=(0.1831,),
        stddev=(0.2964,),
        splits={"train": "train", "validation": "validation", "test": "test"},
        class_names=tuple("0123456789"),
        # The digit may stand at the very edge of the canvas, where a crop would cut its strokes
        # and a reflected border would add some; and it is at a random place already.
        crop_padding=0,
        horizontal_flip=False,  # A mirrored 2 is no digit.
        fields=("image", "label", "bbox", "mask", "id"),
        builder="cluttered_digits",
        generated=True,
        module="aib_tf.data.cluttered_digits",
    ),
    DatasetInfo(
        name="cifar10",
        classes=10,
        image_shape=(32, 32, 3),
        mean=_CIFAR_MEAN,
        stddev=_CIFAR_STDDEV,
        splits=_LAST_TENTH,
        class_names=(
            "airplane",
            "automobile",
            "bird",
            "cat",
            "deer",
            "dog",
            "frog",
            "horse",
            "ship",
            "truck",
        ),
        crop_padding=4,
        horizontal_flip=True,
        fields=("image", "label", "id"),
        builder="cifar10",
    ),
    DatasetInfo(
        name="cifar100",
        classes=100,
        image_shape=(32, 32, 3),
        mean=_CIFAR_MEAN,
        stddev=_CIFAR_STDDEV,
        splits=_LAST_TENTH,
        class_names=class_names.CIFAR100,
        crop_padding=4,
        horizontal_flip=True,
        fields=("image", "label", "id"),
        builder="cifar100",
    ),
    _SVHN,
    # With the 531,131 easier images that the authors call extra. Those of validation are the same: a tenth of train.
    dataclasses.replace(_SVHN, name="svhn_cropped_extra", splits={**_LAST_TENTH, "train": "train[:90%]+extra"}),
    DatasetInfo(
        # Coates et al., "An Analysis of Single-Layer Networks in Unsupervised Feature Learning" (AISTATS 2011), to
        # carry features of CIFAR-10 to: the same classes but one, from other photographs. 5,000 training and 8,000
        # test images, without the 100,000 that have no label.
        name="stl10",
        classes=10,
        image_shape=(96, 96, 3),
        # Over the pixels of the 5,000 training images, as several published codes agree.
        mean=(0.4467, 0.4398, 0.4066),
        stddev=(0.2603, 0.2566, 0.2713),
        splits=_LAST_TENTH,
        class_names=("airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck"),
        crop_padding=12,  # an eighth of the side, as for CIFAR
        horizontal_flip=True,
        fields=("image", "label"),
        builder="stl10",
    ),
    DatasetInfo(
        # Wah et al., "The Caltech-UCSD Birds-200-2011 dataset" (2011): CUB. Training images are cut to
        # the box of the bird, test images are not: they are resized whole, and the centre is taken.
        name="caltech_birds2011",
        classes=200,
        image_shape=(224, 224, 3),
        mean=_IMAGENET_MEAN,
        stddev=_IMAGENET_STDDEV,
        splits=_LAST_TENTH,
        class_names=class_names.CALTECH_BIRDS2011,
        crop_padding=0,
        horizontal_flip=True,
        fields=("image", "label", "bbox", "mask", "id"),
        builder="caltech_birds2011",
        resize=(256, 256),
        crop_to_box=True,
        features={"mask": "segmentation_mask", "id": "image/filename"},
        gray_images=True,
        # Several people drew each outline, and a pixel is as bright as many of them agree: here, more than half.
        mask_threshold=128,
    ),
)

DATASETS: Mapping[str, DatasetInfo] = {info.name: info for info in _TABLE}


_IMAGE_FOLDER = re.compile(r"image_folder(?:_([1-9]\d*))?/(.+)")


def get(name: str, data_dir: str | os.PathLike | None = None) -> DatasetInfo:
    """Looks a data set up.

    Args:
        name: a key of `DATASETS`; a generated set may be followed by a slash and a configuration,
            as in `"cluttered_digits/train600_validation100_test100_seed3"`. Or a folder of pictures
            in `data_dir`, such as `"image_folder/pets"`: images are resized to 256x256 and the
            centre of 224x224 cut out, or with augmentation a random window; with a size, as in
            `"image_folder_32/pets"`, they are resized to that and stay whole, and augmentation
            shifts them by up to an eighth.
        data_dir: folder of data sets as in `aib_tf.data.load`, where an image folder is looked for.

    Returns:
        What the table says, with `name` and `builder` completed by the configuration; or what an
        image folder holds.

    Raises:
        ValueError: if there is no such data set; the message lists those that exist.
        DatasetUnavailableError: if there is no such image folder.
    """
    if name in DATASETS:
        return DATASETS[name]
    if match := _IMAGE_FOLDER.fullmatch(str(name)):
        return _image_folder(name, match[1] and int(match[1]), match[2], data_dir)
    base, slash, configuration = str(name).partition("/")
    info = DATASETS.get(base)
    if info is None or not slash or not info.generated:
        known = ", ".join(sorted(DATASETS))
        raise ValueError(
            f"The data sets are {known}, and image_folder/FOLDER for a folder of pictures. Received: name={name!r}"
        )
    return dataclasses.replace(info, name=name, builder=f"{info.builder}/{configuration}")


def _image_folder(name, size, folder, data_dir):
    """The entry of a folder of pictures, whose classes are the folders in its train folder."""
    names = image_folder.class_names(locations.folder_path(name, folder, data_dir))
    side = size or 224
    return DatasetInfo(
        name=name,
        classes=len(names),
        image_shape=(side, side, 3),
        mean=_IMAGENET_MEAN,
        stddev=_IMAGENET_STDDEV,
        splits={split: split for split in image_folder.SPLIT_FOLDERS},
        class_names=names,
        crop_padding=side // 8 if size else 0,
        horizontal_flip=True,
        fields=("image", "label", "id"),
        builder="image_folder",
        resize=(size, size) if size else (256, 256),
        features={"id": "image/filename"},
        folder=folder,
    )

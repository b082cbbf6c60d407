"""Draws what the best model of a run looks at, in images of its data set or in picture files.

python scripts/visualize.py --run=runs/digits
python scripts/visualize.py --run=runs/digits --images one.png two.jpg --output=mine.png
"""

import dataclasses
import sys
from pathlib import Path

import command_line
import numpy as np
from absl import flags
from PIL import Image, ImageOps, UnidentifiedImageError

from aib_tf import data, files, training, visualization
from aib_tf.data import geometry

_RUN = flags.DEFINE_string("run", None, "Folder of the run.", required=True)
_IMAGES = flags.DEFINE_list("images", [], "Picture files, separated by commas or as further arguments.")
_SPLIT = flags.DEFINE_enum("split", "test", ["train", "validation", "test"], "Which images, without --images.")
_COUNT = flags.DEFINE_integer("count", 16, "How many images, without --images.", lower_bound=1)
_DATA_DIR = flags.DEFINE_string("data_dir", None, "Folder of prepared data sets, if it is not the one of training.")
_OUTPUT = flags.DEFINE_string("output", None, "The PNG file; by default attention_<split>.png or pictures.png in RUN.")

_SHOWN_PIXELS = 256  # side of a person's picture in the figure


def main(arguments):
    run, config = command_line.open_run(_RUN.value, _DATA_DIR.value)
    model = run.load_best()
    if not model.attention_names:
        raise ValueError(f"{config.model.name} has no attention to draw. Received: run={_RUN.value}")
    pictures = [*_IMAGES.value, *arguments]
    default = run.path / ("pictures.png" if pictures else f"attention_{_SPLIT.value}.png")
    output = files.path(_OUTPUT.value or default)
    if pictures:
        draw_pictures(model, data.get(config.data.name, config.data.data_dir), pictures, output)
    else:
        training.draw_attention(model, config, output, _SPLIT.value, _COUNT.value)
    print(f"Drawn in {output}.")


def draw_pictures(model, info, sources, output):
    """Draws a person's own pictures, brought to the model's shape, with the predicted class."""
    height, width, channels = info.image_shape
    shown, seen, names = [], [], []
    for file in sources:
        try:
            with Image.open(file) as picture:
                picture = _plain(picture).convert("L" if channels == 1 else "RGB")
                scale = max(1, _SHOWN_PIXELS // max(height, width))
                shown.append(_fit(picture, info, scale))
                seen.append(_fit(picture, info))
        except FileNotFoundError:
            print(f"{file}: there is no such file; it is left out.", file=sys.stderr)
            continue
        except (UnidentifiedImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            print(f"{file}: this is no picture that can be read ({error}); it is left out.", file=sys.stderr)
            continue
        names.append(Path(file).name)
    if not shown:
        raise ValueError(f"None of the files is a picture. Received: images={','.join(sources)}")
    shape = (len(shown), -1, width, channels)
    images = np.reshape(np.stack(seen), shape)
    explanation = {
        name: np.asarray(value) for name, value in model.explain(data.normalize_images(images, info)).items()
    }
    probabilities = explanation["probabilities"]
    classes = [info.class_names[number] for number in probabilities.argmax(-1)]
    figure = visualization.attention_grid(
        np.stack(shown).reshape(len(shown), *shown[0].shape[:2], channels),
        explanation[model.attention_names[-1]],
        explanation["attention_quantized"][0] if "attention_quantized" in explanation else None,
        titles=[f"{name}\n{label}" for name, label in zip(names, classes, strict=True)],
    )
    visualization.save_figure(figure, output)
    for name, label, row in zip(names, classes, probabilities, strict=True):
        print(f"{name}: {label} ({row.max():.1%})")


def _fit(picture, info, scale=1):
    """Brings a picture to `scale` times the shape of the model: as the evaluation does, or where all images of the data
    set have that shape, by the window in the middle that has its aspect ratio.
    """
    height, width, channels = info.image_shape
    if info.resize is None:
        return np.array(ImageOps.fit(picture, (width * scale, height * scale)))
    info = dataclasses.replace(
        info,
        image_shape=(height * scale, width * scale, channels),
        resize=tuple(side * scale for side in info.resize),
    )
    return geometry.prepare({"image": np.atleast_3d(picture)}, info, augment=False)["image"].numpy()


def _plain(picture):
    """Turns a picture upright, puts a transparent one on white, and brings 16 bits down to 8."""
    picture = ImageOps.exif_transpose(picture)
    if picture.mode.startswith("I"):
        return Image.fromarray((np.asarray(picture).clip(0, 65535) // 257).astype(np.uint8))
    if "A" in picture.getbands() or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return picture


if __name__ == "__main__":
    command_line.run(main)

"""Asks TensorFlow Serving what is in picture files, by a model that scripts/export.py wrote.

python scripts/predict.py --server=localhost:8500 --model=digits one.png two.jpg
python scripts/predict.py --server=http://localhost:8501 --model=digits --signature=predict_mc --format=json one.png
python scripts/predict.py --server=localhost:8500 --model=digits --overlay=attention.png one.png two.jpg
"""

import json
import math
import sys
from pathlib import Path
from typing import NamedTuple

import command_line
import numpy as np
from absl import flags

from aib_tf import serving, visualization

_SERVER = flags.DEFINE_string(
    "server",
    "localhost:8500",
    "Address of the server: host:port or grpc://host:port for gRPC, where TensorFlow Serving's default port is 8500, "
    "or http://host:port for REST, where it is 8501.",
)
_MODEL = flags.DEFINE_string("model", None, "Name of the model on the server.", required=True)
_VERSION = flags.DEFINE_integer("version", None, "Version of the model, if not the server's latest.", lower_bound=0)
_SIGNATURE = flags.DEFINE_string(
    "signature",
    None,
    "How to call the model: serve_bytes, explain or predict_mc, or another one that it has. By default serve_bytes, "
    "or explain with --overlay.",
)
_SAMPLES = flags.DEFINE_integer(
    "samples", None, "Attention maps and latents drawn for each image by predict_mc; 32 by default.", 1, 1000
)
_SEED = flags.DEFINE_integer("seed", None, "Seed of what predict_mc draws; 0 by default.", 0, 2**31 - 1)
_FORMAT = flags.DEFINE_enum("format", "table", ["table", "json"], "A table, or one JSON array of all outputs.")
_OVERLAY = flags.DEFINE_string("overlay", None, "A PNG file to draw the attention over the pictures in.")
_TIMEOUT = flags.DEFINE_float("timeout", 30.0, "Seconds to wait for the answer to one request.")
_RETRIES = flags.DEFINE_integer("retries", 3, "How often to ask again while the server cannot be reached or is slow.")

# One request holds at most so many pictures, bytes of files, and values of pixels, which are long in JSON.
_PICTURES, _BYTES, _VALUES = 32, 2**25, 2**20


class Picture(NamedTuple):
    """A file and its bytes."""

    file: str
    data: bytes


class Answer(NamedTuple):
    """What the server answered for one picture: the model's outputs by name, and where it was asked, its pixels."""

    file: str
    outputs: dict
    pixels: np.ndarray | None


def main(arguments):
    if not arguments:
        raise ValueError("Picture files are expected, such as one.png two.jpg. Received: no files")
    name = _SIGNATURE.value or ("explain" if _OVERLAY.value else "serve_bytes")
    client = serving.Client(_SERVER.value, _MODEL.value, _VERSION.value, timeout=_TIMEOUT.value, retries=_RETRIES.value)
    with client:
        answers = list(ask(client, name, read(arguments)))
    if not answers:
        raise ValueError(f"None of the files is a picture that the model reads. Received: files={','.join(arguments)}")
    if _OVERLAY.value:
        draw(answers, _OVERLAY.value)
    print(as_json(answers) if _FORMAT.value == "json" else as_table(answers))
    if _OVERLAY.value:
        print(f"Drawn in {_OVERLAY.value}.", file=sys.stderr if _FORMAT.value == "json" else sys.stdout)


def read(files):
    """Yields the files that can be read, and names the others."""
    for file in files:
        try:
            yield Picture(file, Path(file).read_bytes())
        except FileNotFoundError:
            print(f"{file}: there is no such file; it is left out.", file=sys.stderr)
        except OSError as error:
            print(f"{file}: it cannot be read ({error.strerror}); it is left out.", file=sys.stderr)


def ask(client, name, pictures):
    """Yields an `Answer` for each picture that the model can decode, and names the others."""
    signature = client.signature(name)
    check(name, signature)
    if "image_bytes" in signature.inputs:
        for batch in batches(pictures, _PICTURES):
            for picture, outputs in send(client, name, batch):
                yield Answer(picture.file, outputs, None)
        return
    # The other signatures take pixels: those that the model sees in the file, by its own preprocessing.
    shape = client.signature("preprocess").outputs["images"].shape
    values = math.prod(size or 1 for size in shape)
    draws = {"samples": 32 if _SAMPLES.value is None else _SAMPLES.value, "seed": _SEED.value or 0}
    for batch in batches(pictures, min(max(_VALUES // values, 1), _PICTURES)):
        seen = send(client, "preprocess", batch)
        if seen:
            images = np.stack([outputs["images"] for _, outputs in seen])
            # One number for each image: a server that forms batches takes no scalars.
            vectors = {key: [value] * len(images) for key, value in draws.items() if key in signature.inputs}
            rows = by_image(client.predict(name, {"images": images, **vectors}), len(images))
            for (picture, _), pixels, outputs in zip(seen, images, rows, strict=True):
                yield Answer(picture.file, outputs, pixels)


def check(name, signature):
    """Raises ValueError unless this script can fill the inputs, use the outputs, and has a use for all flags."""
    if set(signature.inputs) != {"image_bytes"} and set(signature.inputs) - {"samples", "seed"} != {"images"}:
        raise ValueError(
            f"A signature must take images or image_bytes. Received: signature={name}, which takes "
            f"{', '.join(signature.inputs)}"
        )
    missing = {"class_name", "label", "probabilities"} - set(signature.outputs)
    if missing:
        raise ValueError(f"A signature must have outputs {', '.join(sorted(missing))}. Received: signature={name}")
    for flag in (_SAMPLES, _SEED):
        if flag.value is not None and flag.name not in signature.inputs:
            raise ValueError(
                f"--{flag.name} is for signatures that draw samples, such as predict_mc. Received: signature={name}"
            )
    if _OVERLAY.value and ("images" not in signature.inputs or attention_name(signature.outputs) is None):
        raise ValueError(f"--overlay needs the attention, which explain has. Received: signature={name}")


def batches(pictures, most):
    """Yields lists of at most `most` pictures that are not too many bytes together."""
    batch, size = [], 0
    for picture in pictures:
        if batch and (len(batch) == most or size + len(picture.data) > _BYTES):
            yield batch
            batch, size = [], 0
        batch.append(picture)
        size += len(picture.data)
    if batch:
        yield batch


def send(client, name, batch):
    """Returns (picture, outputs) of each file that the model can decode.

    One file that is no image makes the model refuse the request for all; then each is asked for alone.
    """
    try:
        outputs = client.predict(name, {"image_bytes": [picture.data for picture in batch]})
    except serving.ServingError as error:
        if error.code != "INVALID_ARGUMENT":
            raise
        if len(batch) > 1:
            return [answer for picture in batch for answer in send(client, name, [picture])]
        lines = error.details.strip().splitlines() or ["invalid argument"]
        print(f"{batch[0].file}: the model refused it ({lines[0]:.200}); it is left out.", file=sys.stderr)
        return []
    return list(zip(batch, by_image(outputs, len(batch)), strict=True))


def by_image(outputs, count):
    """Splits arrays with a batch axis into one dict for each image."""
    for name, value in outputs.items():
        if value.shape[:1] != (count,):
            raise ValueError(f"An output must have one row for each of {count} images. Received: {name}={value.shape}")
    return [{name: value[index] for name, value in outputs.items()} for index in range(count)]


def class_and_probability(outputs):
    return outputs["class_name"].decode(errors="replace"), float(outputs["probabilities"][outputs["label"]])


def as_json(answers):
    """One JSON array, with one object for each picture: its file, its class, and all outputs of the signature."""
    rows = []
    for answer in answers:
        name, probability = class_and_probability(answer.outputs)
        row = {"file": answer.file, "class_name": name, "probability": probability}
        rows.append(row | {key: value for key, value in answer.outputs.items() if key != "class_name"})
    return json.dumps([{key: plain(value) for key, value in row.items()} for row in rows], ensure_ascii=False)


def plain(value):
    """Turns arrays into lists, bytes into text, and what JSON has no number for into null."""
    if isinstance(value, (np.ndarray, np.generic)):
        value = value.tolist()
    if isinstance(value, list):
        return [plain(item) for item in value]
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    return None if isinstance(value, float) and not math.isfinite(value) else value


def as_table(answers):
    """Lines of file, class and probability, and what else the signature tells of each picture."""
    # Heading -> the output that it shows.
    bits = {"entropy (bits)": "entropy_bits", "mutual information (bits)": "mutual_information_bits"}
    bits["rate (bits)"] = "rate_bits"
    bits = {heading: name for heading, name in bits.items() if name in answers[0].outputs}
    rows = [["file", "class", "probability", *bits]]
    for answer in answers:
        name, probability = class_and_probability(answer.outputs)
        text = f"{probability:.1%}"
        if "probabilities_stddev" in answer.outputs:
            text += f" +- {answer.outputs['probabilities_stddev'][answer.outputs['label']]:.1%}"
        rows.append([answer.file, name, text, *(f"{answer.outputs[key]:.3f}" for key in bits.values())])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            text.ljust(width) if column < 2 else text.rjust(width)
            for column, (text, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )


def attention_name(outputs):
    """The output that holds the attention at the size of the map; of several, the deepest. None without one."""
    numbers = [name.removeprefix("attention") for name in outputs if name.startswith("attention")]
    numbers = sorted((number for number in numbers if number.isdigit()), key=int)
    return "attention" if "attention" in outputs else f"attention{numbers[-1]}" if numbers else None


def draw(answers, file):
    """Draws the pictures as the model saw them, and its attention over them."""
    outputs = [answer.outputs for answer in answers]
    attention = attention_name(outputs[0])
    figure = visualization.attention_grid(
        np.rint(np.stack([answer.pixels for answer in answers])).astype(np.uint8),
        np.stack([row[attention] for row in outputs]),
        np.stack([row["attention_quantized"] for row in outputs]) if "attention_quantized" in outputs[0] else None,
        titles=[f"{Path(answer.file).name}\n{class_and_probability(answer.outputs)[0]}" for answer in answers],
    )
    visualization.save_figure(figure, file)


if __name__ == "__main__":
    command_line.run(main)

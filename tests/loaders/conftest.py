"""Exported models, what `model.explain` says of some pictures, and what each runtime answers."""

import dataclasses
import os
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf

import aib_tf
from tests.loaders import runtimes
from tests.loaders.runtimes import Refusal, Request

DATASET = "cifar10"
INFO = aib_tf.data.get(DATASET)
IMAGES = 4
LOADERS_PYTHON = os.environ.get("AIB_TF_LOADERS_PYTHON")
RUNTIMES = ["tensorflow", "c_api", *(["oldest_tensorflow"] if LOADERS_PYTHON else [])]

# The model that gets the bad requests.
REFUSING = "vgg_aib_qt"
# name: the model, and how it is exported.
EXPORTS = {
    "vgg_aib_qt": ("vgg_aib_qt", {}),
    "vgg_att3": ("vgg_att3", {}),
    "wrn_10_1_aib": ("wrn_10_1_aib", {}),
    "wrn_10_1_aib_uint8": ("wrn_10_1_aib", {"image_dtype": "uint8"}),
    "vgg_aib_qt_xla": ("vgg_aib_qt", {"jit_compile": True}),
    # Not the quantizer's: where bfloat16 moves a value to another anchor, all else moves with it.
    "wrn_10_1_aib_bfloat16": ("wrn_10_1_aib", {"dtype": "bfloat16"}),
}
BUILD = {
    "vgg_aib_qt": {"width": 0.0625, "latent_dim": 8, "num_anchors": 5},
    "vgg_att3": {"width": 0.0625},
    "wrn_10_1_aib": {"width": 0.5, "latent_dim": 8},
}


@dataclasses.dataclass(frozen=True)
class Exported:
    """One exported model.

    Attributes:
        path: its version folder.
        pixels: (IMAGES, 32, 32, 3), 0..255, of the dtype that the signatures take.
        encoded: the same as PNGs, (IMAGES,) bytes.
        expected: what `explain` has to answer, from `model.explain`.
        options: how it was exported.
    """

    path: str
    pixels: np.ndarray
    encoded: np.ndarray
    expected: dict[str, np.ndarray]
    options: dict[str, object]

    @property
    def draws(self):
        """Whether it has the signature predict_mc."""
        return "rate_bits" in self.expected


def randomize(model, pixels, seed):
    """Gives a model weights and running statistics as after a training: none is 0 or 1, and images are told apart."""
    generator = np.random.default_rng(seed)
    for weight in model.weights:
        values = np.array(weight)
        if weight.name == "gamma":
            values = generator.uniform(0.5, 1.5, values.shape)
        elif weight.name == "anchors":
            # Neither sorted nor evenly spaced.
            values = np.arange(len(values)) / (len(values) - 1)
            values = generator.permutation(values + generator.uniform(-0.05, 0.05, values.shape))
        elif weight.name in ("kernel", "bias", "beta"):
            values = values + generator.normal(0, 0.1, values.shape) * (values.std() or 1)
        weight.assign(values)
    images = aib_tf.data.normalize_images(pixels.astype("float32"), INFO)
    for _ in range(10):
        model(images, training=True)  # the running statistics
    last = model.decoder if hasattr(model, "decoder") else model.classifiers[-1]
    kernel, bias = last.weights[-2:]
    logits = np.array(model.explain(images)["logits"])
    scale = 2 / logits.std(0)
    bias.assign((bias - logits.mean(0)) * scale)
    kernel.assign(kernel * scale)


def draw_pixels(count, seed):
    """Draws (count, 32, 32, 3) uint8 pictures of large coloured patches, which differ more than noise does."""
    generator = np.random.default_rng(seed)
    patches = generator.integers(0, 256, (count, 4, 4, 3)).repeat(8, axis=1).repeat(8, axis=2)
    noise = generator.normal(0, 20, (count, 32, 32, 3))
    return np.clip(patches + noise, 0, 255).astype(np.uint8)


def explanation(model, pixels):
    """What an exported model has to answer to these pixels, in the names of the signature `explain`."""
    explained = model.explain(aib_tf.data.normalize_images(pixels, INFO))
    explained = {name: keras.ops.convert_to_numpy(value) for name, value in explained.items()}
    expected = {name: explained[name] for name in ("logits", "probabilities")}
    expected["label"] = expected["probabilities"].argmax(-1)
    expected["class_name"] = np.array([INFO.class_names[label].encode() for label in expected["label"]])
    maps = {name.removesuffix("_mean"): explained[name] for name in model.attention_names}
    expected |= maps
    for name, value in maps.items():
        expected[f"{name}_image"] = tf.image.resize(value[..., None], (32, 32)).numpy()[..., 0]
    if "attention_quantized" in explained:
        (expected["attention_quantized"],) = explained["attention_quantized"]
        distances = np.abs(maps["attention"][..., None] - np.array(model.quantizer.anchors))
        expected["anchor_index"] = distances.argmin(-1).astype("int32")
    if "kl" in explained:
        expected["rate_bits"] = explained["kl"] / np.float32(np.log(2))
    return expected


def undisputed(model, pixels):
    """The pictures of which no attention value lies where rounding decides which of two anchors is nearer."""
    if getattr(model, "quantizer", None) is None:
        return pixels[:IMAGES]
    explained = model.explain(aib_tf.data.normalize_images(pixels, INFO))
    distances = np.abs(np.array(explained["attention_mean"])[..., None] - np.array(model.quantizer.anchors))
    nearest, second = np.moveaxis(np.sort(distances, axis=-1), -1, 0)[:2]
    chosen = pixels[(second - nearest).min(axis=(1, 2)) > 1e-4][:IMAGES]
    assert len(chosen) == IMAGES, "draw more pictures"
    return chosen


@pytest.fixture(scope="session")
def exported(tmp_path_factory):
    """Dict of `Exported`, by the names of EXPORTS."""
    folder = tmp_path_factory.mktemp("exported")
    models, pixels, found = {}, {}, {}
    for seed, (name, overrides) in enumerate(BUILD.items()):
        models[name] = aib_tf.models.build(name, INFO.image_shape, INFO.classes, seed=seed, **overrides)
        drawn = draw_pixels(8 * IMAGES, seed)
        randomize(models[name], drawn, seed)
        pixels[name] = undisputed(models[name], drawn)
    for name, (model_name, options) in EXPORTS.items():
        model, images = models[model_name], pixels[model_name]
        path = aib_tf.export.saved_model(model, folder / name, dataset=DATASET, **options)
        encoded = np.array([tf.io.encode_png(image).numpy() for image in images])
        expected = explanation(model, images.astype("float32"))
        found[name] = Exported(
            str(path),
            images.astype(options.get("image_dtype", "float32")),
            encoded,
            expected,
            options,
        )
    return found


def good_requests(exported, with_vectors=True):
    """Requests for one model, by names of their own."""
    pixels, encoded = exported.pixels, exported.encoded
    requests = {
        "serving_default": ("serving_default", {"images": pixels}),
        "serving_default_of_one": ("serving_default", {"images": pixels[:1]}),
        "serve_bytes": ("serve_bytes", {"image_bytes": encoded}),
        "explain": ("explain", {"images": pixels}),
        "preprocess": ("preprocess", {"image_bytes": encoded}),
    }
    drawn = {
        "predict_mc": (pixels, 70, 7),  # more samples than are drawn at once, 64 for all images together
        "predict_mc_again": (pixels, 70, 7),
        "predict_mc_with_another_seed": (pixels, 70, 8),
        "predict_mc_of_the_third": (pixels[2:3], 70, 7),
    }
    if with_vectors:
        drawn["predict_mc_with_vectors"] = (pixels, [40, 3, 70, 1], [7, 8, 9, 10])
        drawn["predict_mc_of_the_second_with_vectors"] = (pixels[1:2], [3], [8])
    if exported.draws:
        for name, (images, samples, seed) in drawn.items():
            inputs = {"images": images, "samples": np.array(samples, np.int32), "seed": np.array(seed, np.int32)}
            requests[name] = ("predict_mc", inputs)
    return {name: Request(exported.path, signature, inputs) for name, (signature, inputs) in requests.items()}


NONE = np.zeros((0, 32, 32, 3))
# name: the signature, what of a good request is replaced, and what the error says.
BAD = {
    "bytes_that_are_no_image": (
        "serve_bytes",
        {"image_bytes": np.array([b"this is no picture"])},
        "Unknown image file format",
    ),
    "no_bytes_at_all": ("serve_bytes", {"image_bytes": np.array([b""])}, "Input is empty"),
    "half_a_picture": ("preprocess", {"image_bytes": np.array([b"\x89PNG\r\n\x1a\n"])}, "Invalid PNG"),
    "zero_strings": ("serve_bytes", {"image_bytes": np.array([], "S1")}, "`image_bytes` must hold at least one image"),
    "a_matrix_of_strings": ("serve_bytes", {"image_bytes": np.array([[b"x", b"y"]])}, "shape"),
    "one_image_without_a_batch": ("serving_default", {"images": np.zeros((32, 32, 3))}, "[?,32,32,3]"),
    "images_with_an_axis_more": ("explain", {"images": np.zeros((1, 1, 32, 32, 3))}, "[?,32,32,3]"),
    "images_of_another_size": ("serving_default", {"images": np.zeros((2, 28, 28, 3))}, "[?,32,32,3]"),
    "grey_images": ("explain", {"images": np.zeros((2, 32, 32, 1))}, "[?,32,32,3]"),
    "grey_images_to_draw_for": ("predict_mc", {"images": np.zeros((2, 32, 32, 1))}, "[?,32,32,3]"),
    "zero_images": ("serving_default", {"images": NONE}, "`images` must hold at least one image"),
    "zero_images_to_explain": ("explain", {"images": NONE}, "`images` must hold at least one image"),
    "zero_images_to_draw_for": ("predict_mc", {"images": NONE}, "`images` must hold at least one image"),
    "zero_samples": ("predict_mc", {"samples": np.array(0)}, "`samples` must be 1 to 1000"),
    "minus_one_sample": ("predict_mc", {"samples": np.array(-1)}, "`samples` must be 1 to 1000"),
    "1001_samples": ("predict_mc", {"samples": np.array(1001)}, "`samples` must be 1 to 1000"),
    "1001_samples_for_one_image": ("predict_mc", {"samples": np.array([1, 2, 1001, 3])}, "`samples` must be 1 to 1000"),
    "samples_for_three_of_four_images": ("predict_mc", {"samples": np.array([1, 2, 3])}, "`samples` must be a scalar"),
    "a_matrix_of_seeds": ("predict_mc", {"seed": np.zeros((4, 1))}, "`seed` must be a scalar"),
}


def bad_requests(exported, good):
    """Requests for one model that it has to refuse, each followed by a good one of the same signature."""
    requests = {}
    for name, (signature, replaced, _) in BAD.items():
        inputs = good[signature].inputs
        # The types are right, so that nothing but what is meant is wrong.
        replaced = {
            key: value if value.dtype.kind == "S" else value.astype(inputs[key].dtype)
            for key, value in replaced.items()
        }
        requests[name] = Request(exported.path, signature, {**inputs, **replaced})
        requests[f"after_{name}"] = good[signature]
    return requests


@dataclasses.dataclass(frozen=True)
class Answered:
    """What a runtime answered: `answers[name of the model, name of the request]`, and its own facts."""

    runtime: str
    answers: dict[tuple[str, str], dict[str, np.ndarray] | Refusal]
    facts: dict


def ask(runtime, requests, folder):
    """Has a runtime answer requests, which are named; returns an `Answered`."""
    listed = list(requests.values())
    if runtime in ("oldest_tensorflow", "openvino") and not LOADERS_PYTHON:
        pytest.skip("It takes an environment of its own: run `make test-loaders`")
    if runtime == "c_api":
        if not runtimes.c_compiler():
            message = "There is no C compiler; install one (Debian and Ubuntu: apt-get install gcc libc6-dev)"
            # Where the tests of the compiled op may not be skipped, this one may not either.
            (pytest.fail if os.environ.get("AIB_TF_OPS") == "custom" else pytest.skip)(message)
        answers = runtimes.ask_c_program(runtimes.compile_c_program(folder), listed, folder)
    elif runtime == "openvino":
        answers = runtimes.ask_python(LOADERS_PYTHON, "answer_with_openvino.py", listed, folder)
    else:
        python = LOADERS_PYTHON if runtime == "oldest_tensorflow" else sys.executable
        answers = runtimes.ask_python(python, "answer_with_tensorflow.py", listed, folder)
    return Answered(runtime, dict(zip(requests, answers.outputs, strict=True)), answers.facts)


@pytest.fixture(scope="session", params=RUNTIMES)
def answered(request, exported, tmp_path_factory):
    """What TensorFlow's Python and C interfaces, and the oldest TensorFlow, answer to all requests."""
    requests = {}
    for name, each in exported.items():
        # XLA compiles once more for each number of images and samples.
        good = good_requests(each, with_vectors=not each.options)
        # What is refused does not depend on the network.
        bad = bad_requests(each, good) if name == REFUSING else {}
        requests |= {(name, key): value for key, value in (good | bad).items()}
    return ask(request.param, requests, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="session")
def openvino(exported, tmp_path_factory):
    """What OpenVINO answers to `serving_default`, for one image and for three, by model and number of images."""
    requests = {
        (name, count): Request(each.path, "serving_default", {"images": each.pixels[:count]})
        for name, each in exported.items()
        if each.options.get("dtype") != "bfloat16"  # OpenVINO reads no constants of that type
        for count in (1, 3)
    }
    return ask("openvino", requests, tmp_path_factory.mktemp("openvino"))

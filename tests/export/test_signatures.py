"""What exported models answer, against the models themselves."""

import dataclasses
import io

import keras
import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from aib_tf import data, export, models
from aib_tf.data.geometry import RANDOM_ALGORITHM
from aib_tf.export.inference import MAX_SAMPLES
from tests.export.conftest import MODELS, build, normalized

CLOSE = {"rtol": 2e-5, "atol": 2e-5}
NAMES = np.array(data.get("cifar10").class_names)


def call(loaded, signature, **inputs):
    """The outputs of a signature as arrays."""
    inputs = {name: tf.constant(value) for name, value in inputs.items()}
    return {name: value.numpy() for name, value in loaded.signatures[signature](**inputs).items()}


def encoded(image, format="PNG", **options):
    stream = io.BytesIO()
    Image.fromarray(image.squeeze()).save(stream, format, **options)
    return stream.getvalue()


def refused(loaded, signature, message, **inputs):
    with pytest.raises(tf.errors.InvalidArgumentError, match=message):
        call(loaded, signature, **inputs)


def assert_alike(actual, expected, tolerance):
    """Compares by the largest number: those near 0 are differences of large ones."""
    assert np.abs(actual - np.asarray(expected)).max() <= tolerance * np.abs(expected).max()


@pytest.mark.parametrize("name", MODELS)
def test_every_signature_agrees_with_the_model(name, exported, pixels):
    model, _, loaded = exported(name)
    images = pixels.astype(np.float32)
    expected = {key: value.numpy() for key, value in model.explain(normalized(pixels)).items()}
    default = call(loaded, "serving_default", images=images)
    assert set(default) == {"logits", "probabilities", "label", "class_name"}
    np.testing.assert_allclose(default["logits"], expected["logits"], **CLOSE)
    np.testing.assert_allclose(default["probabilities"], expected["probabilities"], **CLOSE)
    np.testing.assert_array_equal(default["label"], expected["logits"].argmax(-1))
    np.testing.assert_array_equal(default["class_name"].astype(str), NAMES[default["label"]])

    explanation = call(loaded, "explain", images=images)
    maps = {"attention": expected["attention_mean"]} if "attention_mean" in expected else {}
    maps |= {key: expected[key] for key in model.attention_names if key != "attention_mean"}
    optional = {}
    if "kl" in expected:
        optional["rate_bits"] = expected["kl"] / np.log(2)
    if "attention_quantized" in expected:
        optional["attention_quantized"] = expected["attention_quantized"][0]
        anchors = model.quantizer.anchors.numpy()
        optional["anchor_index"] = np.abs(maps["attention"][..., None] - anchors).argmin(-1)
    large = {f"{key}_image": tf.image.resize(value[..., None], (32, 32))[..., 0] for key, value in maps.items()}
    assert set(explanation) == {*default, *maps, *large, *optional}
    for key, value in {**default, **maps, **large, **optional}.items():
        if value.dtype == object or "index" in key or key == "label":
            np.testing.assert_array_equal(explanation[key], value)
        else:
            np.testing.assert_allclose(explanation[key], value, **CLOSE)
    assert all(len(value) == len(pixels) for value in explanation.values())
    assert ("predict_mc" in loaded.signatures) == ("attention_mean" in expected or "kl" in expected)


def test_pictures_are_what_their_pixels_are(exported, pixels):
    _, _, loaded = exported("vgg_aib_qt")
    image_bytes = np.array([encoded(image) for image in pixels], object)
    images = call(loaded, "preprocess", image_bytes=image_bytes)["images"]
    assert images.dtype == np.float32
    np.testing.assert_array_equal(images, pixels)
    served = call(loaded, "serve_bytes", image_bytes=image_bytes)
    expected = call(loaded, "serving_default", images=pixels.astype(np.float32))
    for name, value in expected.items():
        np.testing.assert_array_equal(served[name], value)


def test_pictures_of_every_kind_are_decoded_and_brought_to_size(exported):
    _, _, loaded = exported("vgg_aib_qt")
    rows, columns = np.ogrid[:90, :120]
    picture = np.stack([np.broadcast_to(plane, (90, 120)) for plane in (2 * rows, 2 * columns, rows + columns)], -1)
    picture = picture.astype(np.uint8)
    kinds = [
        encoded(picture),
        encoded(picture, "JPEG", quality=95),
        encoded(picture, "JPEG", quality=95, progressive=True),
        encoded(np.dstack([picture, np.full((90, 120), 255, np.uint8)])),
    ]
    images = call(loaded, "preprocess", image_bytes=np.array(kinds, object))["images"]
    middle = Image.fromarray(picture[:, 15:105]).resize((32, 32), Image.Resampling.BILINEAR)
    for image in images:
        assert np.abs(image - np.asarray(middle, np.float32)).max() < 6
    grey = call(loaded, "preprocess", image_bytes=np.array([encoded(picture[..., 0])], object))["images"]
    assert (grey[..., 0] == grey[..., 1]).all() and (grey[..., 1] == grey[..., 2]).all()


def test_pictures_of_birds_are_cut_as_in_the_evaluation(tmp_path):
    info = dataclasses.replace(
        data.get("caltech_birds2011"), image_shape=(32, 32, 3), resize=(38, 40), classes=3, class_names=("a", "b", "c")
    )
    folder = export.saved_model(build("vgg", classes=3, width=0.05), tmp_path / "birds", dataset=info)
    loaded = tf.saved_model.load(str(folder))
    picture = np.random.default_rng(2).integers(0, 256, (70, 50, 3), dtype=np.uint8)
    images = call(loaded, "preprocess", image_bytes=np.array([encoded(picture)], object))["images"]
    whole = np.asarray(Image.fromarray(picture).resize((40, 38), Image.Resampling.BILINEAR), np.float32)
    assert np.abs(images[0] - whole[3:35, 4:36]).max() <= 1


def noise_of(seed, samples, size):
    return np.stack(
        [tf.random.stateless_normal((size,), (seed, number), alg=RANDOM_ALGORITHM) for number in range(samples)]
    )


@pytest.mark.parametrize("name", ["vgg_aib", "vgg_aib_qt", "wrn_10_1_aib_qt"])
def test_monte_carlo_prediction_is_the_average_of_its_draws(name, exported, pixels):
    model, _, loaded = exported(name)
    samples, seed = 7, 11
    prediction = call(loaded, "predict_mc", images=pixels.astype(np.float32), samples=samples, seed=seed)

    features = model.features(normalized(pixels), training=False)
    mean, stddev = model.attention.distribution(features)
    places = int(np.prod(mean.shape[1:]))
    noise = noise_of(seed, samples, places + 8)
    draws = []
    for row in noise:
        attention = mean + stddev * row[:places].reshape(mean.shape[1:])
        if model.quantizer is not None:
            attention = model.quantizer.nearest(attention).quantized
        code = model.encoder(features + features * attention, training=False)
        code_mean, code_stddev = model.bottleneck.distribution(code)
        draws.append(tf.nn.softmax(model.decoder(code_mean + code_stddev * row[places:], training=False)))
    draws = np.array(draws, np.float64)
    average = draws.mean(0)
    np.testing.assert_allclose(prediction["probabilities"], average, **CLOSE)
    np.testing.assert_allclose(prediction["probabilities_stddev"], draws.std(0), rtol=1e-3, atol=1e-5)
    entropy = -(average * np.log2(average)).sum(-1)
    np.testing.assert_allclose(prediction["entropy_bits"], entropy, rtol=1e-4)
    expected_entropy = -(draws * np.log2(draws)).sum(-1).mean(0)
    np.testing.assert_allclose(prediction["mutual_information_bits"], entropy - expected_entropy, atol=1e-5)
    assert (prediction["probabilities_stddev"] > 0).all()
    np.testing.assert_array_equal(prediction["label"], average.argmax(-1))
    np.testing.assert_array_equal(prediction["class_name"].astype(str), NAMES[prediction["label"]])


def test_the_answer_for_an_image_depends_on_nothing_else_in_the_request(exported, pixels):
    _, _, loaded = exported("vgg_aib_qt")
    images = pixels.astype(np.float32)
    # More than go through the encoder at once, and another number for each image.
    samples, seeds = np.int32([1, 100, 3, 64, 65]), np.int32([5, 6, 5, -7, 2**31 - 1])
    together = call(loaded, "predict_mc", images=images, samples=samples, seed=seeds)
    for row in range(len(images)):
        alone = call(loaded, "predict_mc", images=images[row : row + 1], samples=samples[row], seed=seeds[row])
        for name in ("probabilities", "probabilities_stddev", "entropy_bits", "mutual_information_bits"):
            np.testing.assert_allclose(together[name][row], alone[name][0], rtol=1e-4, atol=1e-6)
    assert (together["probabilities_stddev"][0] == 0).all() and together["mutual_information_bits"][0] == 0


def test_the_same_seed_gives_the_same_answer_and_another_one_another(exported, pixels):
    _, _, loaded = exported("vgg_aib")
    first, again, other = (
        call(loaded, "predict_mc", images=pixels.astype(np.float32), samples=4, seed=seed) for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(first["probabilities"], again["probabilities"])
    assert (first["probabilities"] != other["probabilities"]).any(axis=-1).all()


def test_a_bad_request_is_refused_and_the_next_one_answered(exported, pixels):
    _, _, loaded = exported("vgg_aib_qt")
    images = pixels.astype(np.float32)
    before = call(loaded, "predict_mc", images=images, samples=3, seed=0)
    for signature in ("serving_default", "explain"):
        refused(loaded, signature, "at least one image", images=images[:0])
    for signature in ("serve_bytes", "preprocess"):
        refused(loaded, signature, "at least one image", image_bytes=np.array([], object))
        for content in (b"", b"no image", encoded(pixels[0])[:100]):
            refused(
                loaded, signature, "(?i)decode|unknown image|truncated|png", image_bytes=np.array([content], object)
            )
    for samples in (0, -1, MAX_SAMPLES + 1, np.int32([1, 1, 0, 1, 1])):
        refused(loaded, "predict_mc", "`samples` must be 1 to 1000", images=images, samples=samples, seed=0)
    refused(loaded, "predict_mc", "`seed` must be a scalar or have one", images=images, samples=1, seed=[1, 2])
    refused(loaded, "predict_mc", "`samples` must be a scalar or", images=images, samples=np.ones((5, 1), "i4"), seed=0)
    for wrong in (images[0], images[:, :16], images[..., :1]):
        with pytest.raises((TypeError, ValueError, tf.errors.InvalidArgumentError)):
            call(loaded, "serving_default", images=wrong)
    after = call(loaded, "predict_mc", images=images, samples=3, seed=0)
    np.testing.assert_array_equal(after["probabilities"], before["probabilities"])


@pytest.mark.parametrize("options", [{"jit_compile": True}, {"image_dtype": "uint8"}, {"dtype": "bfloat16"}], ids=str)
def test_other_forms_of_a_model_answer_alike(options, exported, pixels, tmp_path):
    # bfloat16 has 8 bits of mantissa in the place of 24, and a score that goes to another anchor changes everything.
    name, tolerance = ("vgg_aib", 0.15) if "dtype" in options else ("vgg_aib_qt", 5e-5)
    model, folder, loaded = exported(name)
    other_folder = export.saved_model(model, tmp_path / "model", dataset="cifar10", **options)
    other = tf.saved_model.load(str(other_folder))
    dtype = np.uint8 if "image_dtype" in options else np.float32
    assert set(other.signatures) == set(loaded.signatures)
    for signature, more in (("serving_default", {}), ("explain", {}), ("predict_mc", {"samples": 5, "seed": 3})):
        expected = call(loaded, signature, images=pixels.astype(np.float32), **more)
        answer = call(other, signature, images=pixels.astype(dtype), **more)
        assert set(answer) == set(expected)
        for output in ("logits", "probabilities", "rate_bits", "attention", "entropy_bits"):
            if output in expected:
                assert_alike(answer[output], expected[output], tolerance)
    image_bytes = np.array([encoded(image) for image in pixels], object)
    images = call(other, "preprocess", image_bytes=image_bytes)["images"]
    assert images.dtype == dtype
    np.testing.assert_array_equal(images, pixels)
    if "dtype" in options:
        sizes = [(path / "saved_model.pb").stat().st_size for path in (other_folder, folder)]
        assert sizes[0] < sizes[1]


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16", "float64"])
def test_a_model_that_was_saved_under_another_policy_is_served(policy, pixels, tmp_path):
    keras.config.set_dtype_policy(policy)
    try:
        build("vgg_aib_qt", width=0.05, latent_dim=8).save(tmp_path / "model.keras")
    finally:
        keras.config.set_dtype_policy("float32")
    model = keras.saving.load_model(tmp_path / "model.keras")
    loaded = tf.saved_model.load(str(export.saved_model(model, tmp_path / "model", dataset="cifar10")))
    answer = call(loaded, "explain", images=pixels.astype(np.float32))
    assert_alike(answer["logits"], model.explain(normalized(pixels))["logits"], 5e-5 if policy == "float64" else 0.15)
    drawn = call(loaded, "predict_mc", images=pixels.astype(np.float32), samples=3, seed=0)
    np.testing.assert_allclose(drawn["probabilities"].sum(-1), 1, rtol=1e-5)


@pytest.mark.parametrize("channels", [2, 4])
def test_images_that_no_picture_decodes_to_are_served_as_pixels(channels, tmp_path):
    backbone = keras.Sequential([keras.Input((12, 10, channels)), keras.layers.Conv2D(4, 3, name="conv")])
    model = models.attach_attention(backbone, "conv", 3)
    loaded = tf.saved_model.load(str(export.saved_model(model, tmp_path / "model")))
    assert set(loaded.signatures) == {"serving_default", "explain", "predict_mc"}
    pixels = np.random.default_rng(0).integers(0, 256, (2, 12, 10, channels)).astype(np.float32)
    answer = call(loaded, "serving_default", images=pixels)
    np.testing.assert_allclose(answer["logits"], model.explain(pixels / 255)["logits"], **CLOSE)


def test_a_model_of_grey_images_in_mixed_precision_is_served_too(tmp_path):
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        model = build("vgg_aib_qt", (32, 32, 1), width=0.05, latent_dim=8)
    finally:
        keras.config.set_dtype_policy("float32")
    folder = export.saved_model(model, tmp_path / "digits", dataset="cluttered_digits")
    loaded = tf.saved_model.load(str(folder))
    pixels = np.random.default_rng(3).integers(0, 256, (3, 32, 32, 1), dtype=np.uint8)
    answer = call(loaded, "explain", images=pixels.astype(np.float32))
    expected = model.explain(normalized(pixels, "cluttered_digits"))
    assert_alike(answer["logits"], expected["logits"], 0.15)
    assert answer["logits"].dtype == answer["attention"].dtype == np.float32
    served = call(loaded, "serve_bytes", image_bytes=np.array([encoded(image) for image in pixels], object))
    np.testing.assert_array_equal(
        served["logits"], call(loaded, "serving_default", images=pixels.astype("f4"))["logits"]
    )

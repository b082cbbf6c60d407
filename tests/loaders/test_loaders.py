"""Exported models in runtimes that share no code with the exporter: TensorFlow alone, its C++ loader, OpenVINO.

`make test` runs the first two; `make test-loaders` adds the oldest TensorFlow and OpenVINO, in an environment of their
own.
"""

import re
from pathlib import Path

import numpy as np
import pytest
from tensorflow.core.framework import types_pb2

from tests.loaders.conftest import BAD, EXPORTS, IMAGES, INFO, REFUSING
from tests.loaders.runtimes import Refusal, read_meta_graph, read_signatures

PYPROJECT = (Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8")
CLASSIFIED = {"logits", "probabilities", "label", "class_name"}
DRAWN = {"probabilities", "probabilities_stddev", "entropy_bits", "mutual_information_bits", "label", "class_name"}

COARSE = 0.25

models = pytest.mark.parametrize("name", EXPORTS)
models_that_draw = pytest.mark.parametrize("name", [name for name in EXPORTS if not name.startswith("vgg_att3")])


def assert_agrees(actual, expected, tolerance):
    """Floating-point numbers agree relative to the largest of them, the rest exactly, unless coarse numbers made it."""
    assert actual.shape == expected.shape
    if expected.dtype.kind == "f":
        assert actual.dtype == np.float32
        np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance * np.abs(expected).max())
    elif tolerance < COARSE:
        np.testing.assert_array_equal(actual, expected)


def assert_same(answer, other, rows=slice(None), tolerance=1e-5):
    """An answer agrees with these rows of another answer of the same model."""
    assert answer.keys() == other.keys()
    for output, value in answer.items():
        assert_agrees(value, other[output][rows], tolerance)


def tolerance_of(exported):
    # Random networks amplify rounding errors, those of XLA in TensorFlow 2.18 to 2e-5. bfloat16 has 8 bits, not 24, and
    # was 11% off on one machine.
    return COARSE if exported.options.get("dtype") == "bfloat16" else 5e-5


def entropy_bits(probabilities):
    return -np.sum(probabilities * np.log2(np.maximum(probabilities, 1e-30)), axis=-1, dtype="float64")


def test_the_models_tell_the_images_apart(exported):
    """Or else what follows would compare constants."""
    for each in exported.values():
        probabilities = each.expected["probabilities"]
        assert len(set(each.expected["label"])) > 1
        assert all(np.abs(probabilities[:i] - probabilities[i]).max(1).min() > 0.05 for i in range(1, IMAGES))


@models
def test_the_batch_is_free_and_leads_in_every_output(exported, name):
    signatures = read_signatures(exported[name].path)
    assert signatures.keys() - {"predict_mc"} == {"serving_default", "serve_bytes", "explain", "preprocess"}
    assert ("predict_mc" in signatures) == exported[name].draws
    for signature in signatures.values():
        images = [signature.inputs[key] for key in ("images", "image_bytes") if key in signature.inputs]
        for tensor in [*images, *signature.outputs.values()]:
            assert tensor.tensor_shape.dim[0].size == -1


@models
def test_explain_is_model_explain(answered, exported, name):
    answer, expected = answered.answers[name, "explain"], exported[name].expected
    assert answer.keys() == expected.keys()
    for output, value in expected.items():
        assert_agrees(answer[output], value, tolerance_of(exported[name]))


@models
@pytest.mark.parametrize(("request_name", "count"), [("serving_default", IMAGES), ("serving_default_of_one", 1)])
def test_serving_default_is_model_explain(answered, exported, name, request_name, count):
    answer, expected = answered.answers[name, request_name], exported[name].expected
    assert answer.keys() == CLASSIFIED
    for output, value in answer.items():
        assert_agrees(value, expected[output][:count], tolerance_of(exported[name]))
    # Of coarse numbers too, the label is that of the answer's own largest.
    np.testing.assert_array_equal(answer["label"], answer["logits"].argmax(-1))
    np.testing.assert_array_equal(answer["class_name"], [INFO.class_names[label].encode() for label in answer["label"]])


@models
def test_serve_bytes_of_a_png_is_serving_default_of_its_pixels(answered, name):
    assert_same(answered.answers[name, "serve_bytes"], answered.answers[name, "serving_default"])


@models
def test_preprocess_of_a_png_is_its_pixels(answered, exported, name):
    (images,) = answered.answers[name, "preprocess"].values()
    assert images.dtype == exported[name].pixels.dtype
    np.testing.assert_array_equal(images, exported[name].pixels)


@models_that_draw
def test_a_seed_gives_the_same_answer_again_and_another_seed_another(answered, name):
    answers = answered.answers
    answer = answers[name, "predict_mc"]
    assert answer.keys() == DRAWN
    assert_same(answers[name, "predict_mc_again"], answer)
    other = answers[name, "predict_mc_with_another_seed"]
    assert np.all(np.abs(other["probabilities"] - answer["probabilities"]).max(1) > 1e-4)


@models_that_draw
def test_an_image_has_the_same_answer_alone_as_in_a_batch(answered, exported, name):
    answers = answered.answers
    # Another size of the batch is another order of summation.
    tolerance = tolerance_of(exported[name])
    assert_same(answers[name, "predict_mc_of_the_third"], answers[name, "predict_mc"], slice(2, 3), tolerance)
    if not exported[name].options:
        alone, together = "predict_mc_of_the_second_with_vectors", "predict_mc_with_vectors"
        assert_same(answers[name, alone], answers[name, together], slice(1, 2), tolerance)


@models_that_draw
def test_uncertainty_is_that_of_a_mixture(answered, name):
    answer = answered.answers[name, "predict_mc"]
    mean, entropy = answer["probabilities"], answer["entropy_bits"]
    np.testing.assert_allclose(mean.sum(1), 1, atol=1e-5)
    np.testing.assert_allclose(entropy, entropy_bits(mean), rtol=1e-4)
    information = answer["mutual_information_bits"]
    assert np.all((information > 0) & (information < entropy))
    # A probability that has this mean varies most where it is 0 or 1.
    variance = answer["probabilities_stddev"] ** 2
    assert np.all((variance > 0) & (variance < mean * (1 - mean)))
    np.testing.assert_array_equal(answer["label"], mean.argmax(1))
    assert answer["class_name"].tolist() == [INFO.class_names[label].encode() for label in answer["label"]]


def test_one_sample_has_no_spread(answered):
    """The fourth of the vectors of samples is 1."""
    answer = answered.answers["vgg_aib_qt", "predict_mc_with_vectors"]
    assert np.all(answer["probabilities_stddev"][:3] > 0)
    np.testing.assert_allclose(answer["probabilities_stddev"][3], 0, atol=1e-6)
    np.testing.assert_allclose(answer["mutual_information_bits"][3], 0, atol=1e-6)


@pytest.mark.parametrize("request_name", BAD)
def test_a_bad_request_is_refused_and_the_next_good_one_answered(answered, request_name):
    signature, _, message = BAD[request_name]
    refusal = answered.answers[REFUSING, request_name]
    assert isinstance(refusal, Refusal), refusal
    # What a server passes on as INVALID_ARGUMENT, the fault of the client.
    assert refusal.kind == "InvalidArgumentError"
    assert message in refusal.message
    good = answered.answers[REFUSING, f"after_{request_name}"]
    assert_same(good, answered.answers[REFUSING, signature])


@pytest.mark.parametrize("answered", ["tensorflow", "oldest_tensorflow"], indirect=True)
def test_python_answers_with_tensorflow_alone(answered):
    assert answered.facts["importable"] == ["tensorflow"]


@pytest.mark.parametrize("answered", ["oldest_tensorflow"], indirect=True)
def test_the_oldest_tensorflow_is_the_oldest_that_is_supported(answered):
    oldest = re.search(r'"tensorflow>=([0-9.]+),', PYPROJECT)[1]
    if answered.facts["python"] >= [3, 13]:
        oldest = "2.20"  # the first with wheels for it
    assert answered.facts["version"].startswith(f"{oldest}.")


def test_the_options_are_in_the_exports(exported):
    """Or else the tests of bfloat16 and XLA would be further ones of float32."""
    compiled, reduced = set(), set()
    for name, each in exported.items():
        for function in read_meta_graph(each.path).graph_def.library.function:
            if function.attr["_XlaMustCompile"].b:
                compiled.add(name)
            if any(node.op == "Conv2D" and node.attr["T"].type == types_pb2.DT_BFLOAT16 for node in function.node_def):
                reduced.add(name)
    assert compiled == {"vgg_aib_qt_xla"}
    assert reduced == {"wrn_10_1_aib_bfloat16"}


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("name", [name for name in EXPORTS if not name.endswith("bfloat16")])
def test_openvino_answers_serving_default(openvino, exported, name, count):
    answer, expected = openvino.answers[name, count], exported[name].expected
    assert answer.keys() == CLASSIFIED
    for output, value in answer.items():
        assert_agrees(value, expected[output][:count], tolerance=1e-4)


def test_openvino_answers_without_tensorflow(openvino):
    assert openvino.facts["imported"] == []

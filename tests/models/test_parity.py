"""The AIB models agree with the authors' PyTorch code, on weights, inputs and noise made from names.

The numbers come from a folder that lies beside a development checkout; `tests/parity_data.py` says how it is found.
"""

import dataclasses

import keras
import numpy as np
import pytest
import tensorflow as tf

import aib_tf
from aib_tf import convert
from aib_tf.convert import names
from tests import parity_data


@dataclasses.dataclass(frozen=True)
class Case:
    """A network of the released code.

    Attributes:
        name: what it is called here and there.
        size, classes, latent_dim, batch: how it was run.
        gradients: relative tolerance on the norms of the gradients in float64. The numbers are PyTorch's in float32,
            where a ReLU or a pooling maximum that flips by rounding moves the gradients of so small a batch: those of
            WideResNet-50-2, normalised over two images, by up to 0.8% also between two settings of ours.
    """

    name: str
    size: int
    classes: int
    latent_dim: int
    batch: int
    gradients: float

    def __str__(self):
        return self.name


CASES = [
    Case("vgg_aib", 32, 10, 256, 4, 1e-2),
    Case("vgg_aib_qt", 32, 10, 256, 4, 1e-3),
    Case("wrn_28_2_aib", 32, 100, 512, 4, 1e-3),
    Case("vgg16_cub_aib_qt", 224, 200, 256, 2, 1e-3),
    Case("wrn_50_2_cub_aib", 224, 200, 256, 2, 1e-2),
]


def make_case(case, dtype="float32"):
    numbers, recipe = parity_data.load(case.name)
    policy = keras.config.dtype_policy()
    keras.config.set_dtype_policy(dtype)
    try:
        model = aib_tf.models.build(case.name, (case.size, case.size, 3), case.classes, kl_weight=0.5)
    finally:
        keras.config.set_dtype_policy(policy)
    seed = int(numbers["meta/seed"])
    state = recipe.state_dict(parity_data.spec(case.name), seed)
    convert.from_pytorch(state, model)
    images = recipe.images(seed, (case.batch, case.size, case.size, 3)).astype(dtype)
    labels = recipe.labels(seed, case.batch, case.classes)
    return model, state, numbers, images, labels, lambda name, shape: recipe.noise(seed, name, shape)


@pytest.fixture(scope="module", params=CASES, ids=str)
def loaded(request):
    return request.param, *make_case(request.param)


def assert_close(actual, expected, relative=1e-4, what=""):
    expected = np.asarray(expected)
    actual = np.reshape(np.asarray(actual), expected.shape)
    np.testing.assert_allclose(actual, expected, rtol=relative, atol=relative * np.abs(expected).max(), err_msg=what)


def assert_explained(explanation, numbers, prefix):
    for name in ("logits", "attention_mean", "attention_stddev", "latent_mean", "latent_stddev", "attention"):
        assert_close(explanation[name], numbers[f"{prefix}/{name}"], what=name)
    assert_close(np.mean(explanation["kl"]), numbers[f"{prefix}/kl"])
    if f"{prefix}/attention_quantized" in numbers:
        for name in ("attention_quantized", "codebook_loss", "commitment_loss"):
            assert_close(explanation[name], numbers[f"{prefix}/{name}"], what=name)


def test_parameter_count_is_that_of_the_pytorch_model(loaded):
    case, model, state, *_ = loaded
    spec = parity_data.spec(case.name)
    unused = names.UNUSED.get(names.architecture_of(model), ("no such name",))
    theirs = sum(
        array.size
        for name, array in state.items()
        if spec[name]["kind"] != "counter" and "same_as" not in spec[name] and not name.startswith(unused)
    )
    own = 1 + 2 * 2  # the warm-up factor, and the states of two noise generators, which PyTorch does not store
    assert sum(np.prod(variable.shape, dtype=int) for variable in model.variables) - own == theirs


def test_state_dict_comes_back_as_it_was(loaded):
    _, model, state, *_ = loaded
    unused = names.UNUSED.get(names.architecture_of(model), ("no such name",))
    back = convert.to_pytorch(model)
    assert set(back) == {name for name in state if not name.startswith(unused)}
    for name, array in back.items():
        np.testing.assert_array_equal(array, state[name], err_msg=name, strict=True)


def test_means_agree(loaded):
    _, model, _, numbers, images, *_ = loaded
    assert_explained(model.explain(images), numbers, "eval_mean1")


@pytest.mark.parametrize("samples", [1, 3])
def test_samples_agree_for_the_same_noise(loaded, samples, monkeypatch):
    case, model, _, numbers, images, _, noise = loaded
    batch, (height, width) = case.batch, model.features.output_shape[1:3]
    # The released code folds n = 1 away: its noise then has no sample axis.
    attention_shape = (batch, height * width) if samples == 1 else (samples, batch, height * width)
    latent_shape = (batch, case.latent_dim) if samples == 1 else (samples, samples * batch, case.latent_dim)
    draws = {
        model.attention.seed_generator: noise("attention", attention_shape).reshape(samples, batch, height, width, 1),
        model.bottleneck.seed_generator: noise("latent", latent_shape).reshape(
            samples, samples * batch, case.latent_dim
        ),
    }
    monkeypatch.setattr(keras.random, "normal", lambda shape, dtype, seed: tf.constant(draws[seed], dtype))
    assert_explained(model.explain(images, samples), numbers, f"eval_noise{samples}")


def weights_by_name(model):
    """Yields (PyTorch name, variable, layout) of the trainable weights."""
    for entry in names.entries(model)[1]:
        for suffix, variable, layout in convert.pytorch.arrays(entry.layer):
            if variable.trainable:
                for name in entry.names:
                    yield f"{name}.{suffix}", variable, layout


def train(model, images, labels, kl, monkeypatch):
    """The logits, cross-entropy, loss and gradients of one step with the noise switched off."""
    monkeypatch.setattr(keras.random, "normal", lambda shape, dtype, seed: tf.zeros(shape, dtype))
    monkeypatch.setattr(model.bottleneck, "kl", kl)
    variables = [variable for _, variable, _ in weights_by_name(model)]
    with tf.GradientTape() as tape:
        logits = tf.cast(model(images, training=True), tf.float64)
        cross_entropy = aib_tf.losses.CrossEntropyBits(dtype="float64")(labels, logits)
        loss = cross_entropy + tf.cast(tf.add_n(model.losses), tf.float64)
    gradients = tape.gradient(loss, [variable.value for variable in variables])
    return logits, cross_entropy, loss, [np.asarray(tf.convert_to_tensor(gradient)) for gradient in gradients]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize(("kl", "total"), [("closed_form", "total"), ("reference", "total_reference")])
def test_training_step_agrees_with_noise_switched_off(case, kl, total, monkeypatch):
    model, _, numbers, images, labels, _ = make_case(case, "float64")
    logits, cross_entropy, loss, gradients = train(model, images, labels, kl, monkeypatch)
    assert_close(logits, numbers["train_mean1/logits"])
    assert_close(cross_entropy * np.log(2), numbers["train_mean1/cross_entropy_nats"])
    assert_close(loss, numbers[f"train_mean1/{total}"])
    compared, largest = 0, max(value for name, value in numbers.items() if name.startswith(f"grad_{total}/norm/"))
    for (name, _, layout), gradient in zip(weights_by_name(model), gradients, strict=True):
        expected = numbers.get(f"grad_{total}/norm/{name}")
        if expected is None:
            continue
        if expected < 1e-6 * largest:
            # A bias in front of a normalisation: its gradient is 0, and PyTorch's, in float32, the sum of its rounding.
            assert np.linalg.norm(gradient) < 1e-6 * largest, name
            continue
        compared += 1
        assert_close(np.linalg.norm(gradient), expected, case.gradients, what=name)
        if f"grad_{total}/full/{name}" in numbers:
            # Elements part further than norms, by the same flips.
            full = numbers[f"grad_{total}/full/{name}"]
            assert_close(layout.to_pytorch(gradient), full, 10 * case.gradients, what=name)
    assert compared > 35
    assert_running_statistics(model, numbers)


def assert_running_statistics(model, numbers):
    statistics = {name: value for name, value in numbers.items() if name.startswith("train_mean1/bn/")}
    compared = 0
    for entry in names.entries(model)[1]:
        if isinstance(entry.layer, keras.layers.BatchNormalization):
            for name in entry.names:
                for suffix, value in (("mean", entry.layer.moving_mean), ("var", entry.layer.moving_variance)):
                    expected = statistics.get(f"train_mean1/bn/{name}.running_{suffix}")
                    if expected is not None:
                        compared += 1
                        assert_close(value, expected, what=name)
    assert compared == len(statistics)


@pytest.mark.parametrize("case", CASES[1:4], ids=str)
def test_gradients_agree_in_float32_too(case, monkeypatch):
    model, _, numbers, images, labels, _ = make_case(case)
    _, _, _, gradients = train(model, images, labels, "closed_form", monkeypatch)
    norms = {
        name: (np.linalg.norm(gradient), numbers[f"grad_total/norm/{name}"])
        for (name, _, _), gradient in zip(weights_by_name(model), gradients, strict=True)
        if f"grad_total/norm/{name}" in numbers
    }
    largest = max(expected for _, expected in norms.values())
    # Smaller ones are sums over all positions that nearly cancel: 2% off where another number of threads adds them up.
    errors = [abs(actual - expected) / expected for actual, expected in norms.values() if expected > 1e-4 * largest]
    # Flips of rounding again; half of the norms are untouched by them.
    assert np.median(errors) < 1e-3
    assert max(errors) < 1e-2

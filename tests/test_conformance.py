"""What every public layer and model has to be able to do, on any Keras backend."""

import json
import re
import subprocess
import sys

import keras
import numpy as np
import pytest

import aib_tf
from tests import descriptors

on_tensorflow = pytest.mark.skipif(
    keras.config.backend() != "tensorflow", reason="tf.distribute and tf.function belong to the TensorFlow backend"
)
# oneDNN and XLA order sums differently from one batch size, or one compilation, to the next.
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def inputs(descriptor, batch=5):
    return np.random.default_rng(0).normal(0.5, 0.5, size=(batch, *descriptor.input_shape)).astype("float32")


def labels(batch=5):
    return np.arange(batch) % 4


def as_model(descriptor, **arguments):
    """The model itself, or a classifier around the layer."""
    if descriptor in descriptors.MODELS:
        return descriptor.make()
    images = keras.Input(descriptor.input_shape)
    code = keras.layers.Flatten()(descriptor.make(name="layer", **arguments)(images))
    classifier = keras.layers.Dense(4, dtype="float32", kernel_initializer=keras.initializers.GlorotUniform(seed=1))
    return keras.Model(images, classifier(code))


def compiled(model, optimizer=None, **arguments):
    optimizer = optimizer or keras.optimizers.SGD(0.01)
    model.compile(optimizer, loss=aib_tf.losses.CrossEntropyBits(), metrics=["accuracy"], **arguments)
    return model


def config_of(model):
    """Its config in JSON, without the numbers of operations: Keras 3.10 counts those with arguments on in a copy."""
    return re.sub(r'"(max|mean)_\d+"', r'"\1"', json.dumps(model.get_config()))


def numpy(values):
    return np.asarray(keras.ops.convert_to_numpy(values))


# JAX compiles every call that is not eager, the large networks in minutes.
ALL = [
    d for d in [*descriptors.LAYERS, *descriptors.MODELS] if not (d.like_another and keras.backend.backend() == "jax")
]
ONCE = [d for d in ALL if not d.like_another]
everything = pytest.mark.parametrize("descriptor", ALL, ids=str)
everything_once = pytest.mark.parametrize("descriptor", ONCE, ids=str)
every_layer = pytest.mark.parametrize("descriptor", descriptors.LAYERS, ids=str)
every_model = pytest.mark.parametrize("descriptor", [d for d in ALL if d in descriptors.MODELS], ids=str)
every_model_once = pytest.mark.parametrize("descriptor", [d for d in ONCE if d in descriptors.MODELS], ids=str)


def test_every_public_layer_and_every_model_is_in_the_table():
    assert {d.name.split(" ")[0] for d in descriptors.LAYERS} == set(aib_tf.layers.__all__)
    assert {d.name.split(" ")[0] for d in descriptors.MODELS} == {*aib_tf.models.names(), "attach_attention"}


@everything
def test_config_makes_the_same_again(descriptor):
    original = descriptor.make()
    copy = type(original).from_config(json.loads(json.dumps(original.get_config())))
    assert config_of(copy) == config_of(original)
    values = keras.ops.convert_to_tensor(inputs(descriptor))  # of an array, a copied model of Keras 3.10 warns
    original(values)
    copy(values)
    assert [tuple(v.shape) for v in copy.variables] == [tuple(v.shape) for v in original.variables]
    copy.set_weights(original.get_weights())
    np.testing.assert_array_equal(numpy(copy(values)), numpy(original(values)))


@every_layer
def test_output_shape_is_the_one_it_announces(descriptor):
    layer = descriptor.make()
    values = inputs(descriptor)
    assert tuple(layer(values).shape) == tuple(layer.compute_output_shape(values.shape))


@every_layer
def test_a_layer_that_is_made_frozen_is_not_trained_by_the_model_around_it(descriptor):
    model = as_model(descriptor, trainable=False)
    ours = [layer for layer in model._flatten_layers() if type(layer).__module__.startswith("aib_tf.layers")]
    frozen = {variable.path for layer in ours for variable in layer.variables}
    assert ours
    assert frozen.isdisjoint(variable.path for variable in model.trainable_variables)


@everything
def test_any_batch_size_gives_each_example_the_same_result(descriptor):
    model = as_model(descriptor)
    values = inputs(descriptor)
    whole = model.predict(values, batch_size=5, verbose=0)
    np.testing.assert_allclose(model.predict(values, batch_size=2, verbose=0), whole, **CLOSE)
    np.testing.assert_allclose(numpy(model(values[:1])), whole[:1], **CLOSE)


@everything
def test_fit_moves_every_trainable_weight_and_reports_finite_numbers(descriptor):
    # Its steps are as long for a small gradient: those of SGD can be lost in the last digit of a bias of -2.
    model = compiled(as_model(descriptor), keras.optimizers.Adam(0.001), jit_compile=False)
    before = [numpy(variable) for variable in model.trainable_variables]
    history = model.fit(inputs(descriptor, 8), labels(8), batch_size=4, epochs=2, verbose=0).history
    assert all(np.isfinite(value).all() for value in history.values()), history
    # Behind a ReLU that is never active in eight images, single weights may stay; a whole tensor does not.
    still = [
        variable.path
        for variable, old in zip(model.trainable_variables, before, strict=True)
        if np.array_equal(numpy(variable), old)
    ]
    assert not still


@everything_once
def test_xla_gives_the_same_results(descriptor):
    values = inputs(descriptor)
    model = compiled(as_model(descriptor), jit_compile=False)
    expected = model.predict(values, verbose=0)
    loss = model.evaluate(values, labels(), verbose=0)[0]
    compiled(model, jit_compile=True)
    np.testing.assert_allclose(model.predict(values, verbose=0), expected, **CLOSE)
    np.testing.assert_allclose(model.evaluate(values, labels(), verbose=0)[0], loss, rtol=1e-4)
    history = model.fit(values, labels(), verbose=0).history
    assert np.isfinite(history["loss"]).all()


@every_layer
@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_mixed_precision_layer_returns_half_precision_and_float32_losses(descriptor, policy):
    exact, mixed = descriptor.make(), descriptor.make(dtype=policy)
    values = inputs(descriptor)
    expected = numpy(exact(values))
    mixed(values)
    mixed.set_weights(exact.get_weights())
    output = mixed(values)
    assert keras.backend.standardize_dtype(output.dtype) == policy.removeprefix("mixed_")
    assert all(keras.backend.standardize_dtype(loss.dtype) == "float32" for loss in mixed.losses)
    step = {"mixed_float16": 2**-11, "mixed_bfloat16": 2**-8}[policy]
    if descriptor.name.startswith("AnchorQuantizer"):
        # A score that rounds across a midpoint goes to the neighbouring anchor.
        agree = np.abs(numpy(keras.ops.cast(output, "float32")) - expected) <= 2 * step
        assert agree.mean() > 0.95
    else:
        np.testing.assert_allclose(numpy(keras.ops.cast(output, "float32")), expected, rtol=20 * step, atol=40 * step)
    for loss, exact_loss in zip(mixed.losses, exact.losses, strict=True):
        np.testing.assert_allclose(numpy(loss), numpy(exact_loss), rtol=20 * step, atol=4 * step**2)


@every_model_once
@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16", "float64"])
def test_model_trains_under_every_dtype_policy(descriptor, policy):
    global_policy = keras.config.dtype_policy()
    if policy == "float64" and keras.config.backend() == "jax":
        policy = "float32"  # JAX computes in float64 only under a global switch
    keras.config.set_dtype_policy(policy)
    try:
        model = compiled(descriptor.make(), jit_compile=False)
    finally:
        keras.config.set_dtype_policy(global_policy)
    history = model.fit(inputs(descriptor, 4), labels(4), verbose=0).history
    assert np.isfinite(history["loss"]).all()
    logits = model(inputs(descriptor))
    assert keras.backend.standardize_dtype(logits.dtype) == "float32"


@pytest.fixture(scope="module")
def reloaded(tmp_path_factory):
    """Predictions of every saved model, loaded by one fresh process that knows only `import aib_tf`."""
    folder = tmp_path_factory.mktemp("saved")
    expected = {}
    for descriptor in ONCE:
        model = compiled(as_model(descriptor))
        model.fit(inputs(descriptor), labels(), verbose=0)
        model.save(folder / f"{descriptor}.keras")
        np.save(folder / f"{descriptor}.inputs.npy", inputs(descriptor))
        expected[str(descriptor)] = model.predict(inputs(descriptor), verbose=0)
    program = (
        "import pathlib, sys, numpy, keras, aib_tf\n"
        "for path in pathlib.Path(sys.argv[1]).glob('*.keras'):\n"
        "    model = keras.saving.load_model(path)\n"
        "    values = numpy.load(path.with_suffix('.inputs.npy'))\n"
        "    numpy.save(path.with_suffix('.outputs.npy'), model.predict(values, verbose=0))\n"
        "    model.fit(values, numpy.arange(5) % 4, verbose=0)\n"
    )
    subprocess.run([sys.executable, "-c", program, str(folder)], check=True, timeout=300)
    return expected, {name: np.load(folder / f"{name}.outputs.npy") for name in expected}


@everything_once
def test_saved_and_loaded_in_a_fresh_process_it_predicts_the_same_and_trains_on(descriptor, reloaded):
    expected, actual = reloaded
    np.testing.assert_allclose(actual[str(descriptor)], expected[str(descriptor)], rtol=1e-5, atol=1e-6)


@on_tensorflow
@everything
def test_traced_with_unknown_sizes_it_gives_the_same_results(descriptor):
    import tensorflow as tf

    model = as_model(descriptor)
    values = inputs(descriptor)
    traced = tf.function(model, input_signature=[tf.TensorSpec((None, *descriptor.input_shape))])
    np.testing.assert_allclose(traced(values), numpy(model(values)), **CLOSE)


@pytest.fixture(scope="module")
def two_replicas():
    """That of all tests in this process: the collective operations of a second one meet its keys."""
    return aib_tf.training.distribution.strategy("mirrored")


@on_tensorflow
@everything_once
def test_two_replicas_agree_with_one_device_on_loss_and_stay_equal_in_training(descriptor, two_replicas):
    values, classes = inputs(descriptor, 8), labels(8)
    alone = compiled(as_model(descriptor), jit_compile=False)
    expected = alone.evaluate(values, classes, batch_size=8, verbose=0, return_dict=True)
    with two_replicas.scope():
        model = compiled(as_model(descriptor), jit_compile=False)
    model.set_weights(alone.get_weights())
    actual = model.evaluate(values, classes, batch_size=8, verbose=0, return_dict=True)
    assert set(actual) == set(expected)
    for name in expected:
        np.testing.assert_allclose(actual[name], expected[name], rtol=1e-4, atol=1e-5, err_msg=name)
    model.fit(values, classes, batch_size=8, epochs=2, verbose=0)
    for variable in model.trainable_variables:
        replicas = two_replicas.experimental_local_results(variable.value)
        np.testing.assert_array_equal(*replicas)
        assert np.isfinite(replicas[0]).all()


@every_model
@pytest.mark.parametrize("samples", [0, 1, 3])
def test_explain_has_the_documented_entries_and_shapes(descriptor, samples):
    model = descriptor.make()
    images = inputs(descriptor)
    if samples and isinstance(model, aib_tf.models.PayAttentionClassifier):
        with pytest.raises(ValueError, match=f"deterministic.*Received: samples={samples}"):
            model.explain(images, samples)
        return
    explanation = {name: numpy(value) for name, value in model.explain(images, samples).items()}
    assert {name: value.shape for name, value in explanation.items()} == documented_shapes(model, samples)
    assert set(model.attention_names) <= set(explanation)
    np.testing.assert_allclose(explanation["probabilities"].sum(-1), 1, rtol=1e-5)
    if samples == 0:
        np.testing.assert_allclose(explanation["logits"], numpy(model(images)), **CLOSE)


def documented_shapes(model, samples):
    shapes = {"logits": (5, 4), "probabilities": (5, 4)}
    if isinstance(model, aib_tf.models.PayAttentionClassifier):
        for number, (_, height, width, _) in enumerate(model.features.output_shape[:-1], start=1):
            shapes |= {f"scores{number}": (5, height, width), f"attention{number}": (5, height, width)}
        return shapes
    height, width = model.features.output_shape[1:3]
    draws, maps = max(samples, 1), (5, height, width)
    latent = (samples, 5, 16) if samples else (5, 16)
    if model.attention is not None:
        shapes |= {"attention_mean": maps, "attention_stddev": maps, "attention": (draws, *maps), "kl": (5,)}
        shapes |= {"latent_mean": latent, "latent_stddev": latent}
    if model.quantizer is not None:
        shapes |= {"attention_quantized": (draws, *maps), "codebook_loss": (), "commitment_loss": ()}
    return shapes


@every_model
def test_explain_adds_no_loss_and_changes_no_metric(descriptor):
    model = descriptor.make()
    model(inputs(descriptor))
    losses = [numpy(loss) for loss in model.losses]
    values = [numpy(metric.result()) for metric in model.metrics]
    model.explain(2 * inputs(descriptor), samples=0 if hasattr(model, "attentions") else 2)
    np.testing.assert_array_equal([numpy(loss) for loss in model.losses], losses)
    np.testing.assert_array_equal([numpy(metric.result()) for metric in model.metrics], values)

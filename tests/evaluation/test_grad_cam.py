import keras
import numpy as np
import pytest
import tensorflow as tf

from aib_tf import models
from aib_tf.evaluation import grad_cam
from aib_tf.evaluation.grad_cam import GradCAM
from aib_tf.evaluation.subject import UnavailableError


def images_of(count, size=8, channels=1, seed=0):
    return np.random.default_rng(seed).normal(size=(count, size, size, channels)).astype(np.float32)


def two_layers(kernel, shape=(2, 2, 2), activation=None, policy=None):
    """Doubles the image, then one dense layer over all of it."""
    kernel = np.asarray(kernel, np.float32)
    model = keras.Sequential(
        [
            keras.Input(shape),
            keras.layers.Rescaling(2.0, name="doubled", dtype=policy),
            keras.layers.Flatten(dtype=policy),
            keras.layers.Dense(kernel.shape[1], use_bias=False, activation=activation, dtype=policy),
        ]
    )
    model.layers[-1].set_weights([kernel])
    return model


@pytest.fixture(scope="module")
def convolutional():
    """Two convolutions with a pooling between them, then a small nested head that ends in a vector."""
    keras.utils.set_random_seed(0)
    head_input = keras.Input((4, 4, 5))
    x = keras.layers.Conv2D(6, 3, padding="same", activation="tanh", name="inner")(head_input)
    head = keras.Model(head_input, keras.layers.GlobalAveragePooling2D(name="average")(x), name="head")
    images = keras.Input((8, 8, 1))
    x = keras.layers.Conv2D(5, 3, padding="same", activation="tanh", name="first")(images)
    x = keras.layers.MaxPooling2D(name="pool")(x)
    return keras.Model(images, keras.layers.Dense(3, name="logits")(head(x)), name="small")


def slow_formula(before, after, images, classes):
    """Equations 1 and 2, eagerly and image by image; the model in two parts around the feature maps."""
    maps = []
    for image, label in zip(images, classes, strict=True):
        with tf.GradientTape() as tape:
            features = before(image[None])
            tape.watch(features)
            score = after(features)[0, label]
        gradient = tape.gradient(score, features).numpy()[0]
        features = features.numpy()[0]
        total = np.zeros(features.shape[:2])
        for k in range(features.shape[-1]):
            total += gradient[..., k].mean() * features[..., k]
        maps.append(np.maximum(total, 0))
    return np.stack(maps)


def test_a_map_worked_out_by_hand():
    # Channel 0 of the class-0 weights: 1, 2, 3, 6, mean 3. Channel 1: -1, -1, -1, -1, mean -1.
    kernel = np.zeros((8, 2))
    kernel[0::2, 0] = [1, 2, 3, 6]
    kernel[1::2, 0] = -1
    kernel[0::2, 1] = [0, 0, 0, -4]  # class 1: mean -1, and 0.5
    kernel[1::2, 1] = 0.5
    image = np.zeros((1, 2, 2, 2), np.float32)
    image[0, ..., 0] = [[1, 0], [-2, 1]]
    image[0, ..., 1] = [[0, 1], [1, 3]]
    cam = GradCAM(two_layers(kernel))
    # ReLU(3 * 2 * channel 0 - 1 * 2 * channel 1), and ReLU(-1 * 2 * channel 0 + 0.5 * 2 * channel 1).
    np.testing.assert_allclose(cam(image, [0])[0], [[6, 0], [0, 0]], atol=1e-6)
    np.testing.assert_allclose(cam(image, [1])[0], [[0, 1], [5, 1]], atol=1e-6)
    assert cam.layer == "doubled"
    found = cam(image, [0])
    assert found.shape == (1, 2, 2) and found.dtype == tf.float32


def test_the_class_is_the_predicted_one_unless_it_is_given(convolutional):
    images = images_of(6)
    cam = GradCAM(convolutional)
    predicted = convolutional.predict(images, verbose=0).argmax(axis=1)
    np.testing.assert_array_equal(cam(images), cam(images, predicted))
    np.testing.assert_array_equal(cam(images, 2), cam(images, np.full(6, 2)))
    assert not np.allclose(cam(images, 2), cam(images, 1))


@pytest.mark.parametrize(("layer", "nested"), [("first", False), ("inner", True), ("head/inner", True), (None, True)])
def test_a_map_equals_the_formula_taken_image_by_image(convolutional, layer, nested):
    images = images_of(4, seed=1)
    classes = [0, 2, 1, 0]
    head, logits = convolutional.get_layer("head"), convolutional.get_layer("logits")
    pool = keras.Model(convolutional.inputs[0], convolutional.get_layer("pool").output)
    if nested:
        inner = head.get_layer("inner")
        expected = slow_formula(
            lambda x: inner(pool(x)), lambda x: logits(tf.reduce_mean(x, axis=(1, 2))), images, classes
        )
    else:
        first = keras.Model(convolutional.inputs[0], convolutional.get_layer("first").output)
        expected = slow_formula(first, lambda x: logits(head(convolutional.get_layer("pool")(x))), images, classes)
    assert expected.max() > 0
    np.testing.assert_allclose(GradCAM(convolutional, layer)(images, classes), expected, rtol=1e-4, atol=1e-6)


def test_the_map_of_an_image_does_not_depend_on_the_others_of_its_batch(convolutional):
    images = images_of(5, seed=2)
    cam = GradCAM(convolutional)
    whole = cam(images).numpy()
    assert whole.max() > 0
    for number, image in enumerate(images):
        np.testing.assert_allclose(cam(image[None])[0], whole[number], rtol=1e-5, atol=1e-7)


def test_one_trace_serves_all_batch_sizes_and_weights_are_read_at_each_call(convolutional, monkeypatch):
    traced = []
    inner = grad_cam.logits_of
    monkeypatch.setattr(grad_cam, "logits_of", lambda *arguments: traced.append(1) or inner(*arguments))
    model = keras.models.clone_model(convolutional)
    cam = GradCAM(model)
    before = [cam(images_of(count)).numpy() for count in (4, 3, 1)]
    model.set_weights([0.5 * weight for weight in model.get_weights()])
    after = cam(images_of(4)).numpy()
    assert len(traced) == 1
    assert not np.allclose(before[0], after)


@pytest.mark.parametrize("name", ["vgg", "vgg_aib", "vgg_aib_qt", "vgg_att2"])
def test_maps_of_this_librarys_models_lie_where_the_attention_looks(name):
    model = models.build(name, (32, 32, 3), classes=4, width=0.0625, seed=0)
    images = images_of(3, 32, 3)
    explanation = model.explain(images)
    counted = [float(metric.result()) for metric in model.metrics]
    found = GradCAM(model)(images)
    shape = explanation[model.attention_names[-1]].shape if model.attention_names else (3, 16, 16)
    assert found.shape == shape
    assert np.isfinite(found).all() and (found.numpy() >= 0).all() and found.numpy().max() > 0
    # The model is left as it was: nothing counted, no loss, no layer covered.
    assert not model.losses
    assert [float(metric.result()) for metric in model.metrics] == counted
    assert all("call" not in vars(layer) for layer in model._flatten_layers())


def test_the_gradient_passes_attention_and_quantizer_straight_through():
    model = models.build("vgg_aib_qt", (32, 32, 1), classes=3, width=0.0625, seed=1)
    images = images_of(1, 32)
    classes = [1]

    def after(features):
        mean, _ = model.attention.distribution(features)
        # x + stop(q(x) - x) has the value of the quantized score and the gradient of the score.
        quantized = mean + tf.stop_gradient(model.quantizer.nearest(mean).quantized - mean)
        code, _ = model.bottleneck.distribution(model.encoder(features + features * quantized, training=False))
        return model.decoder(code, training=False)

    expected = slow_formula(lambda x: model.features(x, training=False), after, images, classes)
    np.testing.assert_allclose(GradCAM(model)(images, classes), expected, rtol=1e-3, atol=1e-6)


def test_local_features_that_the_global_vector_comes_from_get_that_gradient_too():
    model = models.build("vgg_att2", (32, 32, 1), classes=3, width=0.0625, attention="dp", seed=1)
    deepest = model.features.outputs[-2]
    before = keras.Model(model.features.inputs[0], model.features.outputs[:-1])
    rest = keras.Model(deepest, model.features.outputs[-1])
    images = images_of(2, 32)
    shallow = before(images)[0]

    def expected_of(number):
        def after(local):
            query = rest(local)
            pooled = [
                layer(maps, query)
                for layer, maps in zip(model.attentions, (shallow[number : number + 1], local), strict=True)
            ]
            return model.classifiers[0](tf.concat(pooled, axis=-1))

        return slow_formula(lambda x: before(x)[1], after, images[number : number + 1], [1])[0]

    found = GradCAM(model)(images, 1)
    np.testing.assert_allclose(found, np.stack([expected_of(0), expected_of(1)]), rtol=1e-3, atol=1e-6)


def test_probabilities_are_explained_by_their_logarithm():
    random = np.random.default_rng(0)
    kernel = random.normal(size=(8, 3))
    images = images_of(4, 2, 2)
    logits, probabilities = two_layers(kernel), two_layers(kernel, activation="softmax")
    # ln p_c = y_c - ln sum exp y: the gradient is that of y_c less the mean gradient under the probabilities.
    shares = probabilities.predict(images, verbose=0)
    gradients = kernel.T.reshape(3, 4, 2).mean(axis=1)  # class, channel
    weights = gradients[1] - shares @ gradients
    expected = np.maximum(np.einsum("bhwk,bk->bhw", 2 * images, weights), 0)
    np.testing.assert_allclose(GradCAM(probabilities, probabilities=True)(images, 1), expected, rtol=1e-4, atol=1e-6)
    assert not np.allclose(GradCAM(logits)(images, 1), expected)


def test_a_probability_of_zero_gives_a_finite_map():
    model = two_layers(np.full((8, 2), [1000.0, -1000.0]), activation="softmax")
    image = np.ones((1, 2, 2, 2), np.float32)
    found = GradCAM(model, probabilities=True)(image, 1)
    np.testing.assert_array_equal(found, np.zeros((1, 2, 2)))


def test_a_class_that_nothing_speaks_for_has_a_map_of_zeros():
    kernel = np.zeros((8, 2))
    kernel[:, 1] = -1
    cam = GradCAM(two_layers(kernel))
    image = np.ones((1, 2, 2, 2), np.float32)
    np.testing.assert_array_equal(cam(image, [0]), np.zeros((1, 2, 2)))
    np.testing.assert_array_equal(cam(image, [1]), np.zeros((1, 2, 2)))


def test_mixed_precision_gives_maps_in_float32():
    model = two_layers(np.arange(8)[:, None] * [1, -1], policy="mixed_float16")
    image = np.ones((1, 2, 2, 2), np.float32)
    found = GradCAM(model)(image, [0])
    assert found.dtype == tf.float32
    np.testing.assert_allclose(found, np.full((1, 2, 2), 2 * (3 + 4)), rtol=1e-3)


def test_the_last_layer_with_more_than_one_position_is_taken():
    images = keras.Input((8, 8, 3))
    x = keras.layers.Conv2D(4, 3, name="wide")(images)
    x = keras.layers.GlobalAveragePooling2D(keepdims=True, name="one_position")(x)
    x = keras.layers.Conv2D(2, 1)(x)
    model = keras.Model(images, keras.layers.Flatten()(x))
    assert GradCAM(model).layer == "wide"
    anywhere = keras.Sequential([keras.Input((None, None, 1)), keras.layers.Conv2D(2, 3, name="any_size")])
    anywhere.add(keras.layers.GlobalMaxPooling2D())
    assert GradCAM(anywhere)(images_of(2, 8)).shape == (2, 6, 6)


def test_a_layer_at_work_twice_means_its_last_output():
    images = keras.Input((6, 6, 1))
    shared = keras.layers.Conv2D(1, 3, name="shared", activation="tanh")
    end = keras.layers.Dense(2)
    model = keras.Model(images, end(keras.layers.Flatten()(shared(shared(images)))))
    found = GradCAM(model, "shared")(images_of(2, 6), 0)
    expected = slow_formula(lambda x: shared(shared(x)), lambda x: end(tf.reshape(x, (1, -1))), images_of(2, 6), [0, 0])
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)


def test_layers_that_cannot_be_explained_are_errors_that_say_why(convolutional):
    images = images_of(2)
    with pytest.raises(ValueError, match=r"near names are .*pool.*Received: layer='pol'"):
        GradCAM(convolutional, "pol")
    with pytest.raises(ValueError, match=r"the last ones are .*Received: layer='xyzzy'"):
        GradCAM(convolutional, "xyzzy")
    with pytest.raises(ValueError, match=r"\(batch, height, width, channels\).*layer='average'"):
        GradCAM(convolutional, "average")(images)
    with pytest.raises(ValueError, match=r"\(batch, height, width, channels\).*layer='features' with output list"):
        GradCAM(models.build("vgg_att2", (32, 32, 1), 2, width=0.0625), "features")(images_of(1, 32))
    # What failed left no trace.
    assert all("call" not in vars(layer) for layer in convolutional._flatten_layers())
    twice = keras.Sequential([keras.Input((8, 8, 1)), convolutional, keras.layers.Dense(2)])
    inner = keras.Sequential([keras.Input((3,)), keras.layers.Dense(3, name="first")], name="other")
    twice = keras.Model(twice.inputs[0], inner(convolutional(twice.inputs[0])))
    with pytest.raises(ValueError, match=r"small/first or other/first. Received: layer='first'"):
        GradCAM(twice, "first")
    assert GradCAM(twice, "small/first")(images).shape == (2, 8, 8)


def test_a_layer_that_the_model_does_not_call_is_an_error():
    class Idle(keras.Model):
        def __init__(self):
            super().__init__()
            self.used = keras.layers.Conv2D(2, 3)
            self.idle = keras.layers.Conv2D(2, 3, name="idle")
            self.idle.build((None, 8, 8, 1))

        def call(self, images):
            return keras.ops.mean(self.used(images), axis=(1, 2))

    model = Idle()
    assert GradCAM(model, model.used.name)(images_of(1)).shape == (1, 6, 6)
    with pytest.raises(ValueError, match=r"does not call this layer. Received: layer='idle'"):
        GradCAM(model, "idle")(images_of(1))


def test_models_that_cannot_be_explained_are_unavailable(convolutional, monkeypatch):
    dense = keras.Sequential([keras.Input((8, 8, 1)), keras.layers.Flatten(), keras.layers.Dense(2)])
    with pytest.raises(UnavailableError, match="no layer whose output is feature maps"):
        GradCAM(dense)
    with pytest.raises(TypeError, match=r"needs a Keras model. Received: model=function"):
        GradCAM(images_of)
    monkeypatch.setattr(keras.config, "backend", lambda: "jax")
    with pytest.raises(UnavailableError, match="Received: Keras backend='jax'"):
        GradCAM(convolutional)


def test_impossible_images_and_classes_are_errors(convolutional):
    cam = GradCAM(convolutional)
    images = images_of(2)
    with pytest.raises(ValueError, match=r"floats of shape.*dtype=uint8"):
        cam(images.astype(np.uint8))
    with pytest.raises(ValueError, match=r"shape=\(8, 8, 1\)"):
        cam(images[0])
    with pytest.raises(ValueError, match=r"Classes must lie in 0..2.*class=3"):
        cam(images, [0, 3])
    with pytest.raises(ValueError, match=r"class=-1"):
        cam(images, -1)
    with pytest.raises(ValueError, match=r"shape \(2,\).*shape=\(3,\)"):
        cam(images, [0, 1, 2])
    with pytest.raises(ValueError, match=r"dtype=float64"):
        cam(images, [0.0, 1.0])

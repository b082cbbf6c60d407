"""docs/addons.md: its examples run, and what it offers agrees with the values of tensorflow-addons 0.23."""

import importlib.metadata
import importlib.util
import io
import json
import re
from pathlib import Path

import keras
import numpy as np
import pytest
from packaging.version import Version
from sklearn.metrics import cohen_kappa_score

from aib_tf.models import blocks
from aib_tf.training import SGD, Adam

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "addons.md").read_text()
VALUES = json.loads(Path(__file__).with_name("values.json").read_text())
START = np.float32(VALUES["start"])
GRADIENTS = np.float32(VALUES["gradients"])
KERAS_HAS_ADAPTIVE_POOLING = hasattr(keras.layers, "AdaptiveAveragePooling2D")


def test_the_examples_of_the_page_run(capsys):
    names = {}
    for example in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL):
        exec(compile(example, "docs/addons.md", "exec"), names)
    assert names["erased"].shape == (16, 32, 32, 3) and names["erased"].dtype == "float32"
    assert round(names["f1"], 3) == 0.778
    assert -1 < names["kappa"] < 1
    assert ("pooled" in names) == KERAS_HAS_ADAPTIVE_POOLING
    if KERAS_HAS_ADAPTIVE_POOLING:
        assert names["pooled"].shape == (8, 3, 4, 16)
    assert "3/3" in capsys.readouterr().out  # the bar of `fit`


def test_the_files_that_the_page_names_exist():
    files = re.findall(r"`(tests/[\w/.]+)`", PAGE)
    assert files
    assert all((ROOT / file).exists() for file in files)


def test_the_values_are_those_of_addons_0_23_with_tensorflow_2_15():
    assert VALUES["versions"]["tensorflow_addons"] == "0.23.0"
    assert VALUES["versions"]["tensorflow"].startswith("2.15.")
    commands = Path(__file__).with_name("make_values.py").read_text()
    for package in ["tensorflow", "tensorflow_addons", "tqdm"]:
        name = "tensorflow-cpu" if package == "tensorflow" else package.replace("_", "-")
        assert f"{name}=={VALUES['versions'][package]}" in commands


def test_addons_is_no_dependency():
    files = [ROOT / "pyproject.toml", *(ROOT / "requirements").glob("*.txt"), *(ROOT / "aib_tf").rglob("*.py")]
    assert len(files) > 10
    for file in files:
        assert not re.search(r"tensorflow[-_.]addons", file.read_text()), file


def test_keras_no_longer_has_a_module_that_addons_imports():
    assert importlib.util.find_spec("keras.src.engine") is None


def test_tensorflow_datasets_brings_tqdm_along():
    assert any(re.match(r"tqdm\b", requirement) for requirement in importlib.metadata.requires("tensorflow-datasets"))


def trained(optimizer, steps):
    """Weights named "kernel" and "anchors" after some steps, both with the same gradients."""
    kernel = keras.Variable(START, name="kernel")
    with keras.name_scope("quantizer"):
        anchors = keras.Variable(START, name="anchors")
    optimizer.build([kernel, anchors])
    for gradient in GRADIENTS[:steps]:
        optimizer.apply([keras.ops.convert_to_tensor(gradient)] * 2)
    optimizer.finalize_variable_values([kernel, anchors])
    return keras.ops.convert_to_numpy(kernel), keras.ops.convert_to_numpy(anchors)


def trajectory(make_optimizer):
    """The kernel after 1, 2, ... steps, each time from the beginning, since reading an average changes the weights."""
    return np.stack([trained(make_optimizer(), steps)[0] for steps in range(1, len(GRADIENTS) + 1)])


def schedule(first, second):
    """The first value for three steps, then the second."""
    return keras.optimizers.schedules.PiecewiseConstantDecay([2], [first, second])


@pytest.mark.parametrize(
    ("name", "kind", "settings"),
    [("sgd", SGD, {"momentum": VALUES["multi_optimizer"]["momentum"]}), ("adam", Adam, {})],
)
def test_one_optimizer_with_a_ratio_for_anchors_is_a_multi_optimizer_of_two(name, kind, settings):
    expected = VALUES["multi_optimizer"]
    rate, ratio = expected["learning_rate"], expected["anchor_learning_rate"] / expected["learning_rate"]
    for steps in range(1, len(GRADIENTS) + 1):
        kernel, anchors = trained(kind(rate, anchor_learning_rate_ratio=ratio, **settings), steps)
        # Our Adam has PyTorch's epsilon, Addons' that of Keras 2.
        np.testing.assert_allclose(kernel, expected[name]["kernel"][steps - 1], rtol=5e-6)
        np.testing.assert_allclose(anchors, expected[name]["anchors"][steps - 1], rtol=5e-6)


def sgd_with_decay(rate):
    """Keras's SGD with the weight decay of the SGDW in the values, for that rate or schedule."""
    expected = VALUES["sgdw"]
    decay = expected["weight_decay"][0] / expected["learning_rate"][0]
    return trajectory(lambda: keras.optimizers.SGD(rate, momentum=expected["momentum"], weight_decay=decay))


def test_sgdw_is_sgd_with_its_weight_decay_divided_by_the_learning_rate():
    weights = sgd_with_decay(VALUES["sgdw"]["learning_rate"][0])
    np.testing.assert_allclose(weights, VALUES["sgdw"]["constant"], rtol=1e-6)


def test_weight_decay_follows_a_schedule_as_that_of_sgdw_did_when_it_was_scheduled_too():
    weights = sgd_with_decay(schedule(*VALUES["sgdw"]["learning_rate"]))
    np.testing.assert_allclose(weights, VALUES["sgdw"]["both_scheduled"], rtol=1e-6)
    # Only the rate scheduled: the same up to the change, and not after it.
    rate_scheduled = np.float32(VALUES["sgdw"]["rate_scheduled"])
    np.testing.assert_allclose(weights[:3], rate_scheduled[:3], rtol=1e-6)
    assert np.all(np.abs(weights[3:] - rate_scheduled[3:]) > 0.02)


@pytest.mark.parametrize("kind", [keras.optimizers.SGD, SGD])
def test_moving_average_with_start_step_1_is_use_ema(kind):
    expected = VALUES["moving_average"]
    averages = trajectory(
        lambda: kind(expected["learning_rate"], momentum=0.0, use_ema=True, ema_momentum=expected["average_decay"])
    )
    np.testing.assert_allclose(averages, expected["start_step_1"]["averages"], rtol=1e-6)
    np.testing.assert_allclose(averages[-1], expected["start_step_1"]["assigned"], rtol=1e-6)


def test_moving_average_by_default_differs_by_the_decayed_first_step():
    expected = VALUES["moving_average"]
    later, default = (np.float64(expected[name]["averages"]) for name in ("start_step_1", "default"))
    first_step = np.float64(expected["default"]["weights"][0]) - START
    powers = expected["average_decay"] ** np.arange(1, len(GRADIENTS) + 1)
    np.testing.assert_allclose(later - default, powers[:, None] * first_step, atol=1e-6)


def test_fit_leaves_the_average_in_the_model():
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])
    pairs = np.random.default_rng(0).normal(size=(8, 4)), np.ones((8, 2))
    before = model.get_weights()[0]
    # An average that never moves on is the weights after the first of the steps.
    model.compile(keras.optimizers.SGD(0.1, use_ema=True, ema_momentum=1.0), "mse")
    model.fit(*pairs, batch_size=8, epochs=5, verbose=0)
    averaged = model.get_weights()[0]
    model.set_weights([before, np.zeros(2)])
    model.compile(keras.optimizers.SGD(0.1), "mse")
    model.fit(*pairs, batch_size=8, epochs=1, verbose=0)
    np.testing.assert_allclose(averaged, model.get_weights()[0], rtol=1e-6)


def test_swap_ema_weights_evaluates_the_average():
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])
    pairs = np.random.default_rng(0).normal(size=(8, 4)), np.ones((8, 2))
    model.compile(keras.optimizers.SGD(0.1, use_ema=True, ema_momentum=0.5), "mse")
    kwargs = {"batch_size": 8, "epochs": 3, "verbose": 0, "validation_data": pairs}
    history = model.fit(*pairs, callbacks=[keras.callbacks.SwapEMAWeights()], **kwargs).history
    # `fit` has left the last average in the model.
    np.testing.assert_allclose(history["val_loss"][-1], model.evaluate(*pairs, verbose=0), rtol=1e-5)


def pooling_layers(output_size):
    """The layers that can pool to this size: ours to squares, Keras's where it has one."""
    layers = []
    if isinstance(output_size, int):
        layers.append(blocks.AdaptiveAveragePooling2D(output_size))
    if KERAS_HAS_ADAPTIVE_POOLING:
        layers.append(keras.layers.AdaptiveAveragePooling2D(output_size))
    return layers


def test_adaptive_pooling_agrees_where_the_output_size_divides():
    expected = VALUES["adaptive_average_pooling"]
    images, tested = np.float32(expected["images"]), 0
    for case in expected["outputs"]:
        for layer in pooling_layers(case["output_size"]):
            np.testing.assert_allclose(layer(images), case["output"], rtol=1e-5, atol=1e-6)
            tested += 1
    assert tested >= 4


def test_adaptive_pooling_takes_pytorch_windows_where_addons_had_an_error():
    expected = VALUES["adaptive_average_pooling"]
    assert expected["error_of_output_size_5"] == "InvalidArgumentError"
    images = np.float32(expected["images"])

    def windows(size):
        return [slice(i * size // 5, -(-(i + 1) * size // 5)) for i in range(5)]

    height, width = images.shape[1:3]
    means = [[images[:, rows, columns].mean((1, 2)) for columns in windows(width)] for rows in windows(height)]
    for layer in pooling_layers(5):
        np.testing.assert_allclose(layer(images), np.moveaxis(means, 2, 0), rtol=1e-5, atol=1e-6)


def test_keras_has_adaptive_pooling_from_3_13_on():
    assert (Version(keras.__version__) >= Version("3.13")) == KERAS_HAS_ADAPTIVE_POOLING


def erased(images, share, fill_value=-1.0, factor=(1.0, 1.0), value_range=(-1, 255)):
    """RandomErasing of squares whose side is this share of the image's, in training."""
    layer = keras.layers.RandomErasing(
        factor=factor, scale=(share**2,) * 2, fill_value=fill_value, value_range=value_range, seed=0
    )
    return keras.ops.convert_to_numpy(layer(images, training=True))


def test_random_erasing_gives_images_of_cutout_one_pixel_from_the_other_edge():
    expected = VALUES["cutout"]
    image, cutouts = np.float32(expected["image"]), np.float32(expected["cutout"])
    mask, size = expected["mask_size"], len(image)
    images = erased(np.stack([image] * 400), mask / size, fill_value=expected["constant_values"])
    found = (images[:, None] == cutouts).all((2, 3, 4))
    assert found.sum(1).tolist() == [1] * 400  # each image is exactly one of the cutouts
    starts = np.array(expected["offsets"])[found.argmax(1)] - mask // 2
    for axis, name in enumerate(["random_cutout_tops", "random_cutout_lefts"]):
        assert set(starts[:, axis]) == {1, 2, 3}
        assert np.flatnonzero(expected[name]).tolist() == [0, 1, 2]


@pytest.mark.parametrize(("size", "side"), [(32, 8), (32, 16), (28, 12), (224, 56), (11, 3)])
def test_random_erasing_erases_a_square_of_the_side_that_was_asked_for(size, side):
    images = erased(np.ones((50, size, size, 1), "float32"), side / size, fill_value=0, value_range=(0, 1))
    zeros = images[..., 0] == 0
    np.testing.assert_array_equal(zeros.any(1).sum(1), side)
    np.testing.assert_array_equal(zeros.any(2).sum(1), side)
    np.testing.assert_array_equal(zeros.sum((1, 2)), side**2)


def test_random_erasing_keeps_the_proportions_of_the_image():
    zeros = erased(np.ones((50, 8, 16, 1), "float32"), 0.5, fill_value=0)[..., 0] == 0
    np.testing.assert_array_equal(zeros.any(2).sum(1), 4)
    np.testing.assert_array_equal(zeros.any(1).sum(1), 8)


def test_random_erasing_clips_its_fill_value_to_the_range():
    images = erased(np.ones((4, 8, 8, 1), "float32"), 0.5, fill_value=-3, value_range=(-2, 2))
    assert np.unique(images).tolist() == [-2, 1]


def test_random_erasing_with_a_plain_factor_of_1_leaves_every_second_image_whole():
    images = erased(np.ones((1000, 8, 8, 1), "float32"), 0.5, fill_value=0, factor=1.0)
    assert 0.45 < (images == 1).all((1, 2, 3)).mean() < 0.55


def test_random_erasing_works_in_training_only():
    layer = keras.layers.RandomErasing(factor=(1.0, 1.0), fill_value=0)
    images = np.ones((4, 8, 8, 1), "float32")
    np.testing.assert_array_equal(layer(images, training=False), images)
    assert np.any(keras.ops.convert_to_numpy(layer(images, training=True)) != images)


def test_random_erasing_can_be_mapped_over_a_data_set():
    import tensorflow as tf

    layer = keras.layers.RandomErasing(factor=(1.0, 1.0), scale=(0.25, 0.25), fill_value=0)
    images = tf.data.Dataset.from_tensors(np.ones((20, 8, 8, 1), "float32"))
    [batch] = images.map(lambda batch: layer(batch, training=True))
    assert np.sum(batch.numpy() == 0, axis=(1, 2, 3)).tolist() == [16] * 20


def test_tqdm_counts_the_epochs_and_steps_that_the_bars_of_addons_counted():
    from tqdm.keras import TqdmCallback

    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    shown = io.StringIO()
    bars = TqdmCallback(file=shown)
    model.fit(np.zeros((6, 2)), np.zeros((6, 1)), batch_size=2, epochs=2, verbose=0, callbacks=[bars])
    assert [bars.epoch_bar.n, bars.epoch_bar.total] == VALUES["progress_bar"]["epochs"]
    assert [bars.batch_bar.n, bars.batch_bar.total] == VALUES["progress_bar"]["steps"]
    assert "2/2" in shown.getvalue() and "loss=" in shown.getvalue()


@pytest.mark.parametrize("case", VALUES["f1_score"]["cases"])
def test_f1_score_agrees(case):
    values = VALUES["f1_score"]
    metric = keras.metrics.F1Score(average=case["average"], threshold=case["threshold"])
    for batch in range(2):
        metric.update_state(
            np.float32(values[case["truth"]][batch]),
            np.float32(values["scores"][batch]),
            sample_weight=np.float32(values["sample_weight"][batch]) if case["weighted"] else None,
        )
    np.testing.assert_allclose(metric.result(), case["score"], rtol=1e-5, atol=1e-6)


def kappa_of(case, **kwargs):
    """Scikit-learn's kappa over both batches together."""
    values = VALUES["cohen_kappa"]
    truth, predicted, sample_weight = (np.ravel(values[name]) for name in ("truth", "predicted", "sample_weight"))
    weights = {"sample_weight": sample_weight} if case["weighted"] else {}
    return cohen_kappa_score(truth, predicted, weights=case["weightage"], **weights, **kwargs)


@pytest.mark.parametrize("case", VALUES["cohen_kappa"]["cases"])
def test_cohen_kappa_agrees(case):
    classes = range(VALUES["cohen_kappa"]["num_classes"])
    np.testing.assert_allclose(kappa_of(case, labels=classes), case["kappa"], rtol=1e-5)


def test_cohen_kappa_needs_the_classes_when_one_is_absent_and_distances_count():
    for case in VALUES["cohen_kappa"]["cases"]:
        assert (abs(kappa_of(case) - case["kappa"]) > 1e-3) == (case["weightage"] is not None)

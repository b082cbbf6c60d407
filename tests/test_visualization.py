import subprocess
import sys
import threading

import numpy as np
import pytest

import aib_tf
from aib_tf import visualization


@pytest.fixture
def images():
    return np.random.default_rng(0).integers(0, 256, size=(3, 32, 32, 3), dtype=np.uint8)


@pytest.fixture
def attention():
    return np.random.default_rng(1).uniform(0.1, 0.9, size=(3, 8, 8))


def texts(figure):
    """The titles of the panels: centred above images, on the left above curves."""
    titles = (axes.get_title() or axes.get_title(loc="left") for axes in figure.axes)
    return [title for title in titles if title]


def test_an_overlay_without_weight_is_the_grey_image_and_with_all_of_it_the_colours(images):
    grey = visualization.overlay(images[0], np.ones((4, 4)), alpha=0)
    luma = np.rint(images[0] @ np.array([0.299, 0.587, 0.114]))
    np.testing.assert_array_equal(grey, np.repeat(luma[..., None], 3, axis=2))
    ramp = np.linspace(0, 1, 32)[None].repeat(32, axis=0)
    colours = visualization.overlay(images[0], ramp, alpha=1)
    np.testing.assert_array_equal(colours[0, 0], [68, 1, 84])  # the ends of viridis
    np.testing.assert_array_equal(colours[0, -1], [253, 231, 37])


def test_an_overlay_is_lightest_where_the_map_is_highest():
    attention = np.zeros((4, 4))
    attention[1, 2] = 1
    picture = visualization.overlay(np.full((32, 32, 1), 100, np.uint8), attention).sum(axis=2)
    y, x = np.unravel_index(picture.argmax(), picture.shape)
    assert (y // 8, x // 8) == (1, 2)
    assert picture.shape == (32, 32)


def test_an_overlay_stretches_each_map_unless_a_range_is_given():
    image = np.zeros((8, 8), np.uint8)
    attention = np.arange(64.0).reshape(8, 8)
    first = visualization.overlay(image, attention)
    np.testing.assert_array_equal(first, visualization.overlay(image, 0.5 + attention / 1000))
    fixed = visualization.overlay(image, attention, value_range=(0, 1))
    assert (fixed[1:] == fixed[-1, -1]).all()  # clipped beyond the range
    constant = visualization.overlay(image, np.full((2, 2), 0.3), alpha=1)
    assert (constant == [68, 1, 84]).all()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (dict(alpha=1.5), ValueError, "alpha=1.5"),
        (dict(image=np.zeros((4, 4, 3))), TypeError, "dtype=float64"),
        (dict(image=np.zeros((4, 4, 2), np.uint8)), ValueError, r"shape=\(4, 4, 2\)"),
        (dict(attention_map=np.ones(4)), ValueError, r"shape=\(4,\)"),
        (dict(attention_map=[[np.nan, 1.0]]), ValueError, "values=1 of 2 not finite"),
        (dict(value_range=(1, 0)), ValueError, r"value_range=\(1, 0\)"),
    ],
)
def test_an_impossible_overlay_is_refused(call, error, message):
    good = dict(image=np.zeros((4, 4, 3), np.uint8), attention_map=np.ones((2, 2)))
    with pytest.raises(error, match=message):
        visualization.overlay(**(good | call))


def test_a_grid_shows_image_attention_quantized_and_overlay(images, attention):
    figure = visualization.attention_grid(images, attention, np.round(attention * 4) / 4)
    assert len(figure.axes) == 3 * 4 + 1
    labels = [axes.get_ylabel() for axes in figure.axes if axes.get_ylabel()]
    assert labels == ["image", "attention", "quantized", "overlay"]
    assert len(visualization.attention_grid(images, attention).axes) == 3 * 3 + 1
    panel = figure.axes[1].images[0]
    np.testing.assert_array_equal(panel.get_array(), attention[0])
    assert panel.get_interpolation() == "nearest"


def test_one_scale_serves_the_whole_grid(images, attention):
    attention[2] = attention[2] * 3 - 1  # samples leave 0..1
    figure = visualization.attention_grid(images, attention)
    limits = {axes.images[0].get_clim() for axes in figure.axes[1:9:3]}
    assert limits == {(attention.min(), attention.max())}


def test_wrong_predictions_are_marked_by_frame_and_by_words(images, attention):
    figure = visualization.attention_grid(
        images, attention, labels=[0, 1, 2], predictions=[0, 2, 2], class_names=["a", "$b", "c"]
    )
    assert texts(figure) == ["right: a", "wrong: c\ntrue: $b", "right: c"]
    framed = [axes.spines["left"].get_visible() for axes in figure.axes[:9]]
    assert framed == [False] * 3 + [True] * 3 + [False] * 3
    visualization.figure_to_array(figure)  # a dollar sign is no formula


def test_the_name_of_a_file_that_is_not_utf_8_is_drawn_escaped(images, attention):
    figure = visualization.attention_grid(images, attention, titles=["one", "k\udce4se.png", "three"])
    visualization.figure_to_array(figure)
    assert texts(figure) == ["one", "k\\udce4se.png", "three"]


def test_own_titles_and_boxes_are_drawn(images, attention):
    boxes = [[0.25, 0.0, 0.75, 0.5], [0, 0, 0, 0], [0, 0, 1, 1]]
    figure = visualization.attention_grid(images, attention, titles=["one", "two", "x" * 40], boxes=np.array(boxes))
    assert texts(figure) == ["one", "two", "x" * 21 + "…"]
    rectangle = figure.axes[0].patches[-1]
    assert rectangle.get_xy() == (-0.5, 7.5)
    assert (rectangle.get_width(), rectangle.get_height()) == (16, 16)
    assert [len(axes.patches) for axes in figure.axes[:9]] == [2, 0, 2, 0, 0, 0, 2, 0, 2]


@pytest.mark.parametrize("count", [1, 8, 9])
def test_a_grid_of_any_number_of_grey_images_is_drawn(count):
    images = np.zeros((count, 16, 24, 1), np.uint8)
    figure = visualization.attention_grid(images, np.full((count, 4, 6), 0.5), np.full((count, 4, 6), 0.5))
    assert visualization.figure_to_array(figure).std() > 0
    assert len(figure.axes) == count * 4 + 1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (dict(images=np.zeros((0, 8, 8, 3), np.uint8)), "images=0"),
        (dict(attention=np.ones((2, 4, 4))), r"\(3, h, w\).*shape=\(2, 4, 4\)"),
        (dict(quantized=np.ones((3, 4))), r"quantized.*shape=\(3, 4\)"),
        (dict(titles=["a"]), r"len\(titles\)=1"),
        (dict(attention=np.full((3, 2, 2), np.nan)), "3 of 3 maps.*values=12 of 12"),
    ],
)
def test_an_impossible_grid_is_refused(images, attention, call, message):
    with pytest.raises(ValueError, match=message):
        visualization.attention_grid(**(dict(images=images, attention=attention) | call))


def test_training_curves_draw_what_the_history_holds():
    history = {
        "epoch": [1, 2, 3],
        "loss": [1, 1, 1],
        "accuracy": [0.1, 0.5, None],
        "val_accuracy": [0.1, 0.4, 0.6],
        "val_cross_entropy": [3.0, 2.0, 1.0],
        "val_rate": [9.0, 8.0, float("nan")],
    }
    figure = visualization.training_curves(history, label_entropy=3.3)
    assert texts(figure) == [
        "Accuracy",
        "Cross-entropy",
        "Rate: bound on I(Z;X)",
        "Information plane",
    ]
    x, y = figure.axes[3].lines[0].get_data()
    np.testing.assert_array_equal(x, history["val_rate"])
    np.testing.assert_allclose(y, [0.3, 1.3, 2.3])
    assert visualization.figure_to_array(figure).shape[2] == 3


def test_a_plain_history_of_one_epoch_is_one_panel():
    figure = visualization.training_curves({"accuracy": [0.5]})
    assert texts(figure) == ["Accuracy"]
    visualization.figure_to_array(figure)


def test_recorded_label_information_goes_before_the_computed_one():
    history = {"rate_bits": [5.0], "cross_entropy_bits": [1.0], "label_information_bits": [2.0]}
    figure = visualization.training_curves(history, label_entropy=9.0)
    assert figure.axes[-1].lines[0].get_ydata() == [2.0]


def test_a_history_without_curves_or_of_uneven_length_is_refused():
    with pytest.raises(ValueError, match=r"history=\['loss'\]"):
        visualization.training_curves({"loss": [1.0]})
    with pytest.raises(ValueError, match="lengths="):
        visualization.training_curves({"accuracy": [1.0], "val_accuracy": [1.0, 1.0]})


@pytest.mark.parametrize("ending", ["png", "svg"])
def test_a_figure_is_saved_whole(tmp_path, ending):
    figure = visualization.training_curves({"accuracy": [0.5, 0.6]})
    visualization.save_figure(figure, tmp_path / f"new/a.{ending}")
    assert [path.name for path in (tmp_path / "new").iterdir()] == [f"a.{ending}"]
    with pytest.raises(ValueError, match=r"png.*a\.doc"):
        visualization.save_figure(figure, tmp_path / "a.doc")


def test_threads_draw_the_same_picture_at_the_same_time(images, attention):
    def draw(results, index):
        figure = visualization.attention_grid(images, attention)
        results[index] = visualization.figure_to_array(figure)

    results = [None] * 3
    threads = [threading.Thread(target=draw, args=(results, i)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    draw(alone := [None], 0)
    assert alone[0].dtype == np.uint8
    for result in results:
        np.testing.assert_array_equal(result, alone[0])


def test_drawing_leaves_pyplot_and_its_settings_alone():
    # A stand-in for the parent package, since Keras itself imports pyplot.
    code = f"""
import sys, types
sys.modules["aib_tf"] = package = types.ModuleType("aib_tf")
package.__path__ = {list(aib_tf.__path__)}
import matplotlib, numpy as np
from aib_tf import visualization
def settings():  # To read "backend" would import pyplot.
    return {{name: matplotlib.rcParams[name] for name in matplotlib.rcParams if name != "backend"}}
before = settings()
figure = visualization.attention_grid(np.zeros((1, 8, 8, 1), np.uint8), np.ones((1, 2, 2)))
visualization.figure_to_array(figure)
visualization.figure_to_array(visualization.training_curves({{"accuracy": [1.0]}}))
assert settings() == before
assert "matplotlib.pyplot" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr

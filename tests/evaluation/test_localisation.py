import math

import numpy as np
import pytest

from aib_tf import evaluation, maps
from aib_tf.evaluation import components


def upsampled_by_loops(values, height, width):
    """Bilinear interpolation between pixel centres, written from its definition."""
    h, w = len(values), len(values[0])

    def value(y, x):
        return values[min(max(y, 0), h - 1)][min(max(x, 0), w - 1)]

    result = np.zeros((height, width))
    for i in range(height):
        for j in range(width):
            y, x = (i + 0.5) * h / height - 0.5, (j + 0.5) * w / width - 0.5
            top, left = math.floor(y), math.floor(x)
            for dy, dx in [(0, 0), (0, 1), (1, 0), (1, 1)]:
                weight = (1 - abs(y - top - dy)) * (1 - abs(x - left - dx))
                result[i, j] += weight * value(top + dy, left + dx)
    return result


def reference(attention, inside):
    """Pointing and energy of one enlarged map against one set of pixels."""
    height, width = inside.shape
    best, place, total, mass = -math.inf, None, 0.0, 0.0
    for i in range(height):
        for j in range(width):
            if attention[i, j] > best:
                best, place = attention[i, j], (i, j)
            total += max(attention[i, j], 0)
            mass += max(attention[i, j], 0) * inside[i, j]
    return float(inside[place]), mass / total if total > 0 else 0.0


def gaussian_by_loops(size, sigma):
    def at(i):
        return math.exp(-0.5 * (((i + 0.5) / size - 0.5) / sigma) ** 2)

    # Rounded, so that the middle pixels tie.
    return np.array([[round(at(i) * at(j), 12) for j in range(size)] for i in range(size)])


def test_boxes_and_masks_equal_plain_loops(fake_model, batched):
    random = np.random.default_rng(0)
    n, size = 23, 12
    attention = random.normal(0.2, 1, size=(n, 5, 5)).astype(np.float32)
    corners = np.sort(random.uniform(0, 1, size=(n, 2, 2)), axis=1)
    corners[:, 1] = np.maximum(corners[:, 1], np.minimum(corners[:, 0] + 0.2, 1))
    boxes = corners.reshape(n, 4).astype(np.float32)
    masks = random.uniform(size=(n, size, size, 1)) < 0.3
    dataset = batched(np.zeros(n, int), 10, size, bbox=boxes, mask=masks)
    result = evaluation.localisation(fake_model(attention_mean=attention), dataset)

    expected = {name: [] for name in result.metrics if name.startswith(("pointing", "energy"))}
    for k in range(n):
        in_box = np.zeros((size, size), bool)
        for i in range(size):
            for j in range(size):
                y, x = (i + 0.5) / size, (j + 0.5) / size
                in_box[i, j] = boxes[k, 0] <= y <= boxes[k, 2] and boxes[k, 1] <= x <= boxes[k, 3]
        for name, inside in [("box", in_box), ("mask", masks[k, :, :, 0])]:
            if not inside.any():
                continue
            enlarged = upsampled_by_loops(attention[k].tolist(), size, size)
            for source, values in [
                ("attention", enlarged),
                ("centred", gaussian_by_loops(size, 0.25)),
            ]:
                pointing, energy = reference(values, inside)
                expected[f"pointing_{name}_{source}"].append(pointing)
                expected[f"energy_{name}_{source}"].append(energy)
            expected[f"pointing_{name}_uniform"].append(inside.mean())
            expected[f"energy_{name}_uniform"].append(inside.mean())
    assert len(expected) == 12
    for name, values in expected.items():
        assert result[name].value == pytest.approx(np.mean(values)), name
        assert result[name].images == len(values)


@pytest.mark.parametrize("shape", [(4, 4), (8, 8), (3, 5), (1, 1), (20, 20)])
def test_enlarging_equals_tensorflow(shape):
    import tensorflow as tf

    values = np.random.default_rng(0).normal(size=(2, *shape)).astype(np.float32)
    expected = tf.image.resize(values[..., None], (16, 12), "bilinear")[..., 0]
    np.testing.assert_allclose(maps.upsample(values, 16, 12), expected, atol=1e-5)
    np.testing.assert_allclose(
        maps.upsample(values, 16, 12)[0], upsampled_by_loops(values[0].tolist(), 16, 12), atol=1e-9
    )


@pytest.mark.parametrize("size", [8, 9, 13])
def test_a_constant_map_points_at_the_first_pixel(fake_model, batched, size):
    mask = np.zeros((2, size, size, 1), bool)
    mask[0, 0, 0] = True
    mask[1, -1, -1] = True
    model = fake_model(attention_mean=np.full((2, 3, 3), 0.7))
    result = evaluation.localisation(model, batched([0, 0], size=size, mask=mask))
    np.testing.assert_array_equal(result.per_image["pointing_mask_attention"], [1, 0])
    np.testing.assert_allclose(result.per_image["energy_mask_attention"], 1 / size**2)


def test_of_two_equal_maxima_the_first_in_row_order_counts(fake_model, batched):
    attention = np.zeros((1, 4, 4))
    attention[0, 3, 0] = attention[0, 1, 2] = attention[0, 1, 3] = 1.0
    mask = np.zeros((1, 4, 4, 1), bool)
    mask[0, 1, 2] = True
    result = evaluation.localisation(fake_model(attention_mean=attention), batched([0], size=4, mask=mask))
    assert result["pointing_mask_attention"].value == 1


@pytest.mark.parametrize("size", [7, 8, 30, 31, 96])
def test_the_centred_baseline_points_at_the_first_middle_pixel(size):
    gaussian = maps.centred_gaussian(size, size, 0.25)
    middle = (size - 1) // 2
    assert np.unravel_index(gaussian.argmax(), gaussian.shape) == (middle, middle)
    np.testing.assert_array_equal(gaussian, gaussian[::-1, ::-1])


def test_the_uniform_baseline_is_the_share_of_the_image(fake_model, batched):
    boxes = [[0.0, 0.0, 0.5, 0.5], [0.0, 0.0, 1.0, 1.0]]
    model = fake_model(attention_mean=np.ones((2, 2, 2)))
    result = evaluation.localisation(model, batched([0, 0], bbox=boxes))
    np.testing.assert_array_equal(result.per_image["pointing_box_uniform"], [0.25, 1])
    assert result["energy_box_uniform"].value == 0.625
    assert result["energy_box_attention"].value == pytest.approx(0.625)


def test_images_without_an_object_are_left_out_and_counted(fake_model, batched):
    boxes = [[0.0, 0.0, 1.0, 1.0], [0.0, 0.0, 0.0, 0.0], [0.51, 0.51, 0.52, 0.52]]
    masks = np.zeros((3, 8, 8, 1), np.uint8)
    model = fake_model(attention_mean=np.ones((3, 2, 2)))
    result = evaluation.localisation(model, batched([0, 0, 0], bbox=boxes, mask=masks))
    assert result["pointing_box_attention"].images == 1
    assert result.details["images_without_box"] == 2
    assert result.details["images_without_mask"] == 3
    assert "pointing_mask_attention" not in result.metrics
    assert np.isnan(result.per_image["pointing_box_attention"]).tolist() == [False, True, True]
    with pytest.raises(evaluation.UnavailableError, match="no image has"):
        evaluation.localisation(model, batched([0, 0, 0], mask=masks))


def test_a_map_without_positive_mass_has_no_energy_and_is_counted(fake_model, batched):
    attention = np.stack([np.zeros((2, 2)), -np.ones((2, 2)), np.ones((2, 2))])
    boxes = [[0.0, 0.0, 1.0, 1.0]] * 3
    result = evaluation.localisation(fake_model(attention_mean=attention), batched([0, 0, 0], bbox=boxes))
    np.testing.assert_array_equal(result.per_image["energy_box_attention"], [0, 0, 1])
    assert result.details["maps_without_positive_mass"] == 2


def test_masks_of_bytes_bools_and_shares_mean_the_same(fake_model, batched):
    inside = np.random.default_rng(0).uniform(size=(2, 8, 8, 1)) < 0.4
    model = fake_model(attention_mean=np.random.default_rng(1).uniform(size=(2, 4, 4)))
    results = [
        evaluation.localisation(model, batched([0, 0], mask=mask)).to_dict()
        for mask in (inside, inside * np.uint8(255), np.where(inside, 0.6, 0.4))
    ]
    assert results[0] == results[1] == results[2]


def test_nan_maps_are_counted(fake_model, batched):
    attention = np.ones((6, 2, 2))
    attention[[1, 3], 0, 0] = np.nan
    dataset = batched(np.zeros(6, int), bbox=[[0.0, 0.0, 1.0, 1.0]] * 6)
    with pytest.raises(ValueError, match=r"'attention' of 2 of the 6 .*images=\[1, 3\]"):
        evaluation.localisation(fake_model(attention_mean=attention), dataset)


@pytest.mark.parametrize("box", [[0, 0, 32, 32], [0.5, 0, 0.2, 1], [np.nan, 0, 1, 1], [-0.1, 0, 1, 1]])
def test_a_box_that_is_no_share_of_the_image_is_refused(fake_model, batched, box):
    with pytest.raises(ValueError, match="shares of the image sides"):
        evaluation.localisation(fake_model(attention_mean=np.ones((1, 2, 2))), batched([0], bbox=[box]))


def test_a_plain_model_and_plain_data_are_named_as_such(fake_model, batched):
    with pytest.raises(evaluation.UnavailableError, match="the model has no attention"):
        evaluation.localisation(fake_model(logits=np.ones((1, 2))), batched([0], bbox=[[0.0, 0, 1, 1]]))
    with pytest.raises(evaluation.UnavailableError, match="neither boxes nor masks"):
        evaluation.localisation(fake_model(attention_mean=np.ones((1, 2, 2))), batched([0]))


def otsu_by_loops(values):
    """The lowest value such that cutting behind it makes the variance between both parts largest."""
    levels = sorted(set(values.ravel().tolist()))
    best, cut = -1.0, -math.inf
    for level in levels[:-1]:
        low, high = values[values <= level], values[values > level]
        between = len(low) * len(high) * (low.mean() - high.mean()) ** 2
        if between > best * (1 + 1e-12):
            best, cut = between, level
    return values > cut


def test_otsu_parts_a_map_where_the_variance_between_parts_is_largest():
    random = np.random.default_rng(0)
    values = np.concatenate([random.normal(size=(5, 6, 7)), random.integers(0, 4, size=(5, 6, 7))])
    expected = [otsu_by_loops(value) for value in values]
    np.testing.assert_array_equal(components.upper_part(values), expected)
    assert components.upper_part(np.full((1, 3, 3), 0.3)).all()


def test_the_box_is_that_of_the_largest_component_and_does_not_reach_into_other_images():
    first = np.zeros((6, 6))
    first[0, :2] = 1.0  # two pixels, which touch the next part by a corner only
    first[1:4, 2] = 0.9  # three pixels
    second = np.zeros((6, 6))
    second[5, 5] = second[0, 0] = 2.0  # of equal size: the first counts
    boxes = components.largest_boxes(np.stack([first, second, np.ones((6, 6))]), np.array([0.0, 0.5, 0.95]))
    np.testing.assert_array_equal(boxes[0], [[0, 0, 6, 6], [1, 2, 4, 3], [0, 0, 1, 2]])
    np.testing.assert_array_equal(boxes[1], [[0, 0, 6, 6], [0, 0, 1, 1], [0, 0, 1, 1]])
    np.testing.assert_array_equal(boxes[2], [[0, 0, 6, 6]] * 3)


def test_boxes_overlap_by_their_common_area():
    found = np.array([[[0.0, 0, 4, 4], [2, 2, 6, 4], [5, 5, 6, 6]]])
    np.testing.assert_allclose(components.box_overlaps(found, np.array([[0.0, 0, 4, 4]])), [[1, 4 / 20, 0]])
    masks = np.zeros((2, 5, 6), bool)
    masks[0, 1:3, 2:6] = True
    np.testing.assert_array_equal(components.bounding_boxes(masks), [[1, 2, 3, 6], [0, 0, 0, 0]])


def test_thresholds_of_boxes_are_chosen_on_the_other_images(fake_model, batched):
    # A hot pixel inside of a warm square of 4 x 4: cut below the warmth, the box is that of the square.
    warm = np.zeros((8, 8))
    warm[2:6, 2:6] = 0.42
    warm[3, 3] = 1.0
    box = [0.25, 0.25, 0.75, 0.75]
    alike = evaluation.localisation(fake_model(attention_mean=[warm] * 6), batched([0] * 6, bbox=[box] * 6))
    assert alike["box_accuracy_70_box_attention"].value == alike["max_box_accuracy_box_attention"].value == 1
    # In odd images the object is the hot pixel alone. What is best for one half is wrong for the other.
    small = [3 / 8, 3 / 8, 4 / 8, 4 / 8]
    mixed = evaluation.localisation(fake_model(attention_mean=[warm] * 6), batched([0] * 6, bbox=[box, small] * 3))
    assert mixed["box_accuracy_70_box_attention"].value == 0
    # The whole image is what a uniform map marks: a quarter of it is the object's.
    assert alike["box_accuracy_30_box_uniform"].value == 0
    assert alike["iou_box_uniform"].value == pytest.approx(0.25)
    assert alike["iou_box_attention"].value == 1


def test_masks_alone_give_boxes(fake_model, batched):
    mask = np.zeros((4, 8, 8, 1), bool)
    mask[:, 1:4, 2:7] = True
    result = evaluation.localisation(fake_model(attention_mean=mask[..., 0] * 1.0), batched([0] * 4, mask=mask))
    assert result["max_box_accuracy_box_attention"].value == result["iou_mask_attention"].value == 1
    assert "pointing_box_attention" not in result.metrics

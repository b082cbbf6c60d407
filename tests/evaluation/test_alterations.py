import numpy as np
import pytest

from aib_tf.evaluation import alterations

UNIT = (0.0, 1.0)
# Pixel levels 0 and 255 of images that are normalised channel by channel.
COLOURED = (np.array([-1.0, -2.0, 0.0], np.float32), np.array([1.0, 3.0, 0.5], np.float32))


def waves(height, width, *parts):
    """0.5 plus cosines (amplitude, u, v): u periods along the height, v along the width."""
    y, x = np.arange(height)[:, None], np.arange(width)[None, :]
    image = np.full((height, width), 0.5)
    for amplitude, u, v in parts:
        image += amplitude * np.cos(2 * np.pi * (u * y / height + v * x / width))
    return image[None, :, :, None]


@pytest.mark.parametrize("size", [1, 4, 7])
def test_a_window_is_a_square_of_one_colour_and_nothing_else_changes(size):
    images = np.full((50, 9, 7, 3), 9.0, np.float32)
    altered = alterations.recolour_window(images, size, COLOURED, 0, range(50))
    for image in altered:
        rows, columns = np.nonzero((image != 9).any(axis=-1))
        assert len(rows) == size**2
        assert np.ptp(rows) == np.ptp(columns) == size - 1
        assert len(np.unique(image[rows, columns], axis=0)) == 1
    colours = altered[(altered != 9).all(axis=-1)]
    assert (colours >= COLOURED[0]).all() and (colours <= COLOURED[1]).all()
    # A uniform colour comes near both ends of each channel.
    low, high = COLOURED
    assert (colours.min(axis=0) < low + 0.2 * (high - low)).all()
    assert (colours.max(axis=0) > high - 0.2 * (high - low)).all()
    assert (images == 9).all()


def test_every_place_of_a_window_is_as_likely_as_any_other():
    altered = alterations.recolour_window(np.full((3000, 4, 5, 1), 9.0), 3, UNIT, 0, range(3000))
    corners = [tuple(np.argwhere(image[..., 0] != 9)[0]) for image in altered]
    counts = [corners.count((row, column)) for row in range(2) for column in range(3)]
    assert sum(counts) == 3000
    # Six places, 500 times each; the standard deviation is 20.
    assert np.abs(np.array(counts) - 500).max() < 100


def test_a_window_as_large_as_the_image_recolours_it_and_a_larger_one_is_refused():
    altered = alterations.recolour_window(np.zeros((2, 4, 4, 1)), 4, UNIT, 0, [0, 1])
    assert (altered == altered[:, :1, :1]).all() and (altered > 0).all()
    for size in (5, 0):
        with pytest.raises(ValueError, match=rf"`size` must be an integer from 1 to 4. Received: size={size}"):
            alterations.recolour_window(np.zeros((2, 4, 9, 1)), size, UNIT, 0, [0, 1])


@pytest.mark.parametrize(
    "alter",
    [
        lambda images, indices, seed: alterations.recolour_window(images, 5, UNIT, seed, indices),
        lambda images, indices, seed: alterations.paste_digit(images, UNIT, seed, indices),
    ],
    ids=["window", "digit"],
)
def test_what_is_drawn_depends_on_seed_and_image_alone(alter):
    images = np.random.default_rng(0).random((12, 16, 16, 1)).astype(np.float32)
    whole = alter(images, range(12), 3)
    parts = [alter(images[rows], rows, 3) for rows in np.split(np.arange(12), [1, 8])]
    np.testing.assert_array_equal(whole, np.concatenate(parts))
    np.testing.assert_array_equal(whole[[7]], alter(images[[7]], [7], 3))
    assert (alter(images, range(12), 4) != whole).any(axis=(1, 2, 3)).all()
    assert alter(images[:0], [], 3).shape == (0, 16, 16, 1)


@pytest.mark.parametrize(("shape", "side"), [((32, 32), 8), ((20, 64), 6), ((6, 6), 6), ((64, 48), 12)])
def test_a_digit_has_a_quarter_of_the_side_and_at_least_six_pixels(shape, side):
    images = np.zeros((60, *shape, 1), np.float32)
    altered = alterations.paste_digit(images, UNIT, 0, range(60))
    extents = [np.ptp(np.argwhere(image[..., 0] > 0.01), axis=0) + 1 for image in altered]
    assert np.max(extents) == side == alterations.digit_size(*shape)
    # Ink from faint to full: digits, not blocks.
    assert altered.max() > 0.9 and (altered > 0.5).mean() < 0.5 * side**2 / np.prod(shape)
    assert (altered.max(axis=(1, 2, 3)) > 0.5).all()


def test_a_digit_only_brightens_and_has_the_same_ink_in_every_channel():
    low, high = COLOURED
    black = np.broadcast_to(low, (20, 16, 16, 3))
    altered = alterations.paste_digit(black, COLOURED, 0, range(20))
    ink = (altered - low) / (high - low)
    np.testing.assert_allclose(ink, np.broadcast_to(ink[..., :1], ink.shape), atol=1e-6)
    assert ink.min() >= 0 and 0.9 < ink.max() <= 1
    white = np.broadcast_to(high, (20, 16, 16, 3))
    np.testing.assert_array_equal(alterations.paste_digit(white, COLOURED, 0, range(20)), white)


def test_an_image_too_small_for_a_digit_is_refused():
    with pytest.raises(ValueError, match=r"at least 6 x 6 pixels .*\(1, 5, 9, 1\)"):
        alterations.paste_digit(np.zeros((1, 5, 9, 1)), UNIT, 0, [0])


@pytest.mark.parametrize(("height", "width"), [(32, 32), (16, 24), (15, 17)])
def test_frequencies_are_parted_at_the_radius(height, width):
    slow, fast = (0.1, 0, 2), (0.2, 3, -4)
    image = waves(height, width, slow, fast)
    for radius, below, above in (
        (1.9, (), (slow, fast)),
        (2, (slow,), (fast,)),
        (4.99, (slow,), (fast,)),
        (5, (slow, fast), ()),  # sqrt(3^2 + 4^2) = 5: the border is kept
    ):
        kept = alterations.low_pass(image, radius, (-9, 9))
        np.testing.assert_allclose(kept, waves(height, width, *below), atol=1e-6)
        rest = alterations.high_pass(image, radius, (-9, 9))
        np.testing.assert_allclose(rest, waves(height, width, *above) - 0.5, atol=1e-6)


def test_channels_and_images_keep_to_themselves():
    images = np.concatenate([waves(8, 8, (0.1, 1, 0)), waves(8, 8, (0.1, 0, 3))])
    images = np.concatenate([images, images[::-1]], axis=-1)
    kept = alterations.low_pass(images, 2, (-9, 9))
    flat = np.full((8, 8), 0.5)
    np.testing.assert_allclose(kept[0, ..., 1], flat, atol=1e-6)
    np.testing.assert_allclose(kept[1, ..., 0], flat, atol=1e-6)
    np.testing.assert_allclose(kept[0, ..., 0], images[0, ..., 0], atol=1e-6)


def test_a_radius_of_zero_keeps_the_mean_and_a_large_one_everything():
    images = np.random.default_rng(0).random((3, 8, 6, 2)).astype(np.float32)
    means = np.broadcast_to(images.mean(axis=(1, 2), keepdims=True), images.shape)
    np.testing.assert_allclose(alterations.low_pass(images, 0, UNIT), means, atol=1e-6)
    np.testing.assert_allclose(alterations.low_pass(images, 5, UNIT), images, atol=1e-6)
    np.testing.assert_allclose(alterations.high_pass(images, 5, UNIT), 0, atol=1e-6)


def test_results_are_clipped_to_the_pixel_range():
    low, high = COLOURED
    images = np.where(np.random.default_rng(0).random((4, 8, 8, 3)) < 0.5, low, high)
    for altered in (alterations.low_pass(images, 3, COLOURED), alterations.high_pass(images, 1, COLOURED)):
        assert altered.dtype == np.float32
        assert (altered >= low).all() and (altered <= high).all()
        assert (altered == low).any() and (altered == high).any()


def test_what_is_no_batch_of_images_or_no_radius_is_refused():
    for alter in (
        lambda images: alterations.recolour_window(images, 2, UNIT, 0, [0]),
        lambda images: alterations.paste_digit(images, UNIT, 0, [0]),
        lambda images: alterations.low_pass(images, 2, UNIT),
        lambda images: alterations.high_pass(images, 2, UNIT),
    ):
        with pytest.raises(ValueError, match=r"\(B, H, W, C\). Received: images of shape \(8, 8, 1\)"):
            alter(np.zeros((8, 8, 1)))
    for radius in (-1, np.nan):
        with pytest.raises(ValueError, match=r"radius must be 0 or more. Received: radius="):
            alterations.low_pass(np.zeros((1, 8, 8, 1)), radius, UNIT)

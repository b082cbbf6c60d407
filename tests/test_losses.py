import keras
import numpy as np
import pytest

from aib_tf import losses, metrics
from tests import reference


@pytest.mark.parametrize(("mean", "stddev"), [(0.0, 1.0), (1.5, 0.3), (-0.2, 0.0067), (3.0, 2.5)])
def test_closed_form_kl_is_the_integral_that_defines_it(mean, stddev):
    kl = losses.kl_divergence(np.float32([[mean]]), np.float32([[stddev]]))
    np.testing.assert_allclose(kl, [reference.kl_divergence_by_integration(mean, stddev)], rtol=1e-4, atol=1e-6)


def test_reference_kl_is_the_closed_form_of_the_exponential():
    mean, stddev = np.float64([[0.5, -1.0]]), np.float64([[0.1, 0.4]])
    expected = losses.kl_divergence(mean, np.exp(stddev))
    np.testing.assert_allclose(losses.kl_divergence(mean, stddev, "reference"), expected)


def test_reference_kl_is_smallest_without_noise_and_the_closed_form_at_one():
    stddev = np.linspace(0.01, 2, 200, dtype="float64")[:, None]
    mean = np.zeros_like(stddev)
    assert np.argmin(losses.kl_divergence(mean, stddev, "reference")) == 0
    np.testing.assert_allclose(stddev[np.argmin(losses.kl_divergence(mean, stddev))], 1.0, atol=0.01)


def test_kl_is_summed_over_the_last_axis_in_float32_for_half_precision():
    kl = losses.kl_divergence(np.full((2, 3, 300), 20, np.float16), np.full((2, 3, 300), 1, np.float16))
    assert kl.shape == (2, 3)
    assert keras.backend.standardize_dtype(kl.dtype) == "float32"
    np.testing.assert_allclose(kl, 300 * 200)  # beyond the largest float16, 65,504 / 2 squared


def test_unknown_form_of_the_kl_is_named():
    with pytest.raises(ValueError, match=r"closed_form, reference\. Received: kl='exact'"):
        losses.kl_divergence(np.zeros((1, 1)), np.ones((1, 1)), "exact")


@pytest.mark.parametrize("column", [False, True])
def test_cross_entropy_bits_is_the_mean_over_the_batch_in_bits(column):
    logits = np.random.default_rng(0).normal(size=(6, 4)).astype("float32")
    labels = np.array([0, 1, 2, 3, 0, 1])
    loss = losses.CrossEntropyBits()(labels[:, None] if column else labels, logits)
    np.testing.assert_allclose(loss, reference.cross_entropy_bits(labels, logits).mean(), rtol=1e-5)


def test_one_hot_labels_are_named_by_the_loss_and_the_metrics():
    arguments = np.eye(4)[[0, 1]], np.zeros((2, 4))
    for function in (losses.CrossEntropyBits(), metrics.CrossEntropyBits(), metrics.LabelInformation(4)):
        with pytest.raises(ValueError, match=r"take the argmax\. Received: y_true\.shape=\(2, 4\), y_pred"):
            function(*arguments)


def test_cross_entropy_bits_round_trips_through_its_config():
    loss = losses.CrossEntropyBits(reduction="sum", name="mine")
    copy = keras.losses.deserialize(keras.losses.serialize(loss))
    assert (copy.reduction, copy.name) == ("sum", "mine")


def test_one_bit_is_ln_two_nats():
    np.testing.assert_allclose(losses.nats_to_bits(np.log(2)), 1.0)


class TestAttentionLoss:
    """Closed forms: cases that can be worked out by hand."""

    @staticmethod
    def one_position(count):
        maps = np.zeros((1, 1, count))
        maps[..., 1] = 1.0
        return maps

    @pytest.mark.parametrize("kind", losses.ATTENTION_LOSSES)
    def test_it_is_zero_for_maps_in_proportion(self, kind):
        maps = np.random.default_rng(0).uniform(size=(3, 4, 5))
        np.testing.assert_allclose(losses.attention_loss(0.5 * maps, 7.0 * maps, kind), 0.0, atol=1e-4)
        np.testing.assert_allclose(losses.attention_loss(maps, np.uint8(255 * maps), kind), 0.0, atol=1e-2)

    @pytest.mark.parametrize("positions", [2, 8, 256])
    def test_kl_of_uniform_attention_from_one_position_is_log2_of_their_number(self, positions):
        loss = losses.attention_loss(np.full((1, 1, positions), 0.3), self.one_position(positions))
        np.testing.assert_allclose(loss, [np.log2(positions)], rtol=1e-9)

    def test_kl_is_the_formula_in_bits_with_the_reference_first(self):
        attention, reference = np.float64([[[0.2, 0.2], [0.4, 0.8]]]), np.float64([[[3, 1], [0, 4]]])
        p, q = attention.ravel() / 1.6, reference.ravel() / 8
        expected = sum(b * np.log2(b / a) for a, b in zip(p, q, strict=True) if b)
        np.testing.assert_allclose(losses.attention_loss(attention, reference), [expected], rtol=1e-6)

    def test_kl_of_attention_beside_the_reference_is_large_and_finite(self):
        attention, reference = np.float64([[[1, 0]]]), np.float64([[[0, 1]]])
        np.testing.assert_allclose(losses.attention_loss(attention, reference), [np.log2(1e7)], rtol=1e-3)

    def test_cc_is_one_minus_the_correlation_over_positions(self):
        attention, reference = np.random.default_rng(0).uniform(size=(2, 3, 4, 5))
        expected = [1 - np.corrcoef(a.ravel(), b.ravel())[0, 1] for a, b in zip(attention, reference, strict=True)]
        np.testing.assert_allclose(losses.attention_loss(attention, reference, "cc"), expected, atol=1e-4)

    def test_cc_is_two_where_attention_is_the_opposite_and_one_where_it_is_constant(self):
        mask = np.float64([[[0, 0, 1, 1]]])
        np.testing.assert_allclose(losses.attention_loss(1 - mask, mask, "cc"), [2.0], atol=1e-5)
        np.testing.assert_allclose(losses.attention_loss(np.full_like(mask, 0.3), mask, "cc"), [1.0], atol=1e-9)
        np.testing.assert_allclose(losses.attention_loss(mask, np.ones_like(mask), "cc"), [1.0], atol=1e-9)

    def test_cosine_is_one_minus_that_of_the_angle(self):
        uniform, corner, other = np.ones((1, 2, 2)), np.float64([[[1, 0], [0, 0]]]), np.float64([[[0, 0], [0, 1]]])
        np.testing.assert_allclose(losses.attention_loss(uniform, corner, "cosine"), [0.5], atol=1e-5)
        np.testing.assert_allclose(losses.attention_loss(other, corner, "cosine"), [1.0], atol=1e-5)

    def test_the_reference_is_averaged_over_the_area_of_each_position(self):
        reference = np.arange(36.0).reshape(1, 6, 6)
        pooled = reference.reshape(1, 2, 3, 3, 2).mean((2, 4))
        np.testing.assert_allclose(losses.attention_loss(pooled, reference), 0.0, atol=1e-6)
        # Five pixels on two positions: the middle one counts half for each.
        loss = losses.attention_loss(np.ones((1, 1, 2)), np.float64([[[0, 0, 1, 1, 1]]]))
        np.testing.assert_allclose(loss, [1 - np.log2(6) + 5 / 6 * np.log2(5)], rtol=1e-6)

    @pytest.mark.parametrize("kind", losses.ATTENTION_LOSSES)
    def test_a_mask_may_have_a_channel_and_be_of_integers(self, kind):
        random = np.random.default_rng(0)
        attention, mask = random.uniform(size=(2, 4, 4, 1)).astype("float32"), random.integers(0, 2, (2, 8, 8, 1))
        loss = losses.attention_loss(attention, mask.astype("uint8"), kind)
        assert loss.shape == (2,)
        np.testing.assert_array_equal(loss, losses.attention_loss(attention[..., 0], mask[..., 0] == 1, kind))

    @pytest.mark.parametrize("kind", losses.ATTENTION_LOSSES)
    def test_values_and_gradients_are_finite_for_constant_and_empty_maps(self, kind):
        tf = pytest.importorskip("tensorflow")
        corner = np.eye(1, 16, 3, dtype="float32").reshape(1, 4, 4)

        def gradient_of(attention, given):
            with tf.GradientTape() as tape:
                tape.watch(attention)
                loss = losses.attention_loss(attention, given, kind)
            gradient = tape.gradient(loss, attention).numpy()
            assert np.isfinite(loss).all() and np.isfinite(gradient).all()
            return gradient.ravel()

        for value in (0.0, 1e-30, 0.3):
            for given in (corner, np.ones_like(corner), np.zeros_like(corner)):
                gradient = gradient_of(tf.fill((1, 4, 4), value), given)
        # A constant map is drawn to the reference and does not stay where it is.
        gradient = gradient_of(tf.fill((1, 4, 4), 0.3), corner)
        assert gradient[3] < 0 < np.delete(gradient, 3).min()

    @pytest.mark.parametrize("kind", losses.ATTENTION_LOSSES)
    def test_a_reference_of_zeros_gives_neither_loss_nor_gradient(self, kind):
        tf = pytest.importorskip("tensorflow")
        attention = tf.constant(np.random.default_rng(0).uniform(size=(2, 3, 3)).astype("float32"))
        reference = np.stack([np.zeros((3, 3)), np.eye(3)])
        with tf.GradientTape() as tape:
            tape.watch(attention)
            loss = losses.attention_loss(attention, reference, kind)
        gradient = tape.gradient(loss, attention).numpy()
        assert loss[0] == 0 and loss[1] > 0
        assert not gradient[0].any() and gradient[1].any()

    def test_it_is_computed_in_float32_for_half_precision(self):
        attention = np.full((1, 64, 64), 1.0, np.float16)
        reference = np.full((1, 64, 64), 100, np.float16)  # whose sum no float16 holds
        loss = losses.attention_loss(attention, reference)
        assert keras.backend.standardize_dtype(loss.dtype) == "float32"
        np.testing.assert_allclose(loss, [0.0], atol=1e-5)

    def test_an_unknown_kind_and_what_is_no_map_are_named(self):
        maps = np.ones((1, 2, 2))
        with pytest.raises(ValueError, match=r"kl, cc, cosine\. Received: kind='mse'"):
            losses.attention_loss(maps, maps, "mse")
        with pytest.raises(ValueError, match=r"Received: reference\.shape=\(1, 2, 2, 3\)"):
            losses.attention_loss(maps, np.ones((1, 2, 2, 3)))
        with pytest.raises(ValueError, match=r"Received: attention\.shape=\(2, 2\)"):
            losses.attention_loss(maps[0], maps)

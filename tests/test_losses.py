import keras
import numpy as np
import pytest

from aib_tf import losses
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


def test_cross_entropy_bits_round_trips_through_its_config():
    loss = losses.CrossEntropyBits(reduction="sum", name="mine")
    copy = keras.losses.deserialize(keras.losses.serialize(loss))
    assert (copy.reduction, copy.name) == ("sum", "mine")


def test_one_bit_is_ln_two_nats():
    np.testing.assert_allclose(losses.nats_to_bits(np.log(2)), 1.0)

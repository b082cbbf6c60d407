import numpy as np
import pytest
import tensorflow as tf

from aib_tf.evaluation import attacks

SHAPE = (3, 4, 2)


class Linear:
    """Two classes with logits 0 and w.x + b: label 1 is right where the margin w.x + b is positive."""

    def __init__(self):
        self.weights = np.random.default_rng(0).normal(size=SHAPE).astype(np.float32)
        # A margin of 0 for medium grey, so that both labels occur.
        self.offset = -self.weights.sum() / 2
        self.rows = []

    def margins(self, images):
        return np.sum(np.asarray(images, np.float64) * self.weights, axis=(1, 2, 3)) + self.offset

    def __call__(self, images):
        if tf.executing_eagerly():
            self.rows.append(len(images))
        margins = tf.reduce_sum(images * self.weights, axis=(1, 2, 3)) + self.offset
        return tf.stack([tf.zeros_like(margins), margins], axis=1)


@pytest.fixture
def model():
    return Linear()


@pytest.fixture
def images():
    return np.random.default_rng(1).uniform(0, 1, size=(40, *SHAPE)).astype(np.float32)


def correct_labels(model, images):
    return (model.margins(images) > 0).astype(np.int64)


def worst_margins(model, images, labels, epsilon, low, high):
    """Signed margin of the worst image in reach: each pixel goes as far as ball and range allow."""
    towards = -np.where(labels == 1, 1, -1)[:, None, None, None] * np.sign(model.weights)
    worst = np.clip(images + epsilon * towards, low, high)
    return np.where(labels == 1, 1, -1) * model.margins(worst)


def test_a_linear_margin_falls_by_epsilon_times_the_l1_norm(model, images):
    labels = correct_labels(model, images)
    epsilon = 0.06
    fallen = np.abs(model.margins(images)) - epsilon * np.abs(model.weights).sum()
    found = attacks.fgsm(model, images, labels, epsilon, -9.0, 9.0)
    np.testing.assert_allclose(np.where(labels == 1, 1, -1) * model.margins(found), fallen, atol=1e-5)
    assert 10 < (fallen < 0).sum() < 35
    attack = attacks.pgd(model, images, labels, epsilon, -9.0, 9.0)
    np.testing.assert_array_equal(attack.broken, fallen < 0)
    # Those that stand were driven to the same corner.
    standing = fallen > 0
    np.testing.assert_allclose(attack.images[standing], found[standing], atol=1e-6)


@pytest.mark.parametrize("epsilon", [0.02, np.array([0.0, 0.04], np.float32), np.array([0.05, 0.01], np.float32)])
@pytest.mark.parametrize("ends", [(0.0, 1.0), (np.array([0.2, 0.0]), np.array([0.7, 0.6]))])
def test_attacks_reach_the_corner_of_ball_and_pixel_range(model, images, epsilon, ends):
    low, high = (np.asarray(end, np.float32) for end in ends)
    images = np.clip(images, low, high)
    labels = correct_labels(model, images)
    worst = worst_margins(model, images, labels, epsilon, low, high)
    found = attacks.fgsm(model, images, labels, epsilon, *ends).numpy()
    np.testing.assert_allclose(np.where(labels == 1, 1, -1) * model.margins(found), worst, atol=1e-5)
    attack = attacks.pgd(model, images, labels, epsilon, *ends)
    np.testing.assert_array_equal(attack.broken, worst < 0)
    assert 0 < (worst < 0).sum() < 40
    for changed in (found, attack.images.numpy()):
        assert changed.dtype == np.float32
        assert (np.abs(changed - images) <= epsilon + np.float32(1e-6)).all()
        assert (changed >= low).all() and (changed <= high).all()


def test_a_broken_image_is_the_first_iterate_that_is_misclassified(model, images):
    labels = correct_labels(model, images)
    epsilon, step_size = 0.03, 0.008
    attack = attacks.pgd(model, images, labels, epsilon, -9.0, 9.0, steps=4, step_size=step_size, random_start=False)
    towards = -np.where(labels == 1, 1, -1)[:, None, None, None] * np.sign(model.weights)
    first = np.full(40, 4)
    for step in (3, 2, 1):
        wrong = correct_labels(model, images + step * step_size * towards) != labels
        first[wrong] = step
    reach = np.minimum(first * step_size, epsilon)[:, None, None, None]
    np.testing.assert_allclose(attack.images, images + reach * towards, atol=1e-6)
    assert len(set(first[attack.broken])) > 2
    np.testing.assert_array_equal(correct_labels(model, attack.images) != labels, attack.broken)


def test_broken_images_cost_nothing(images):
    model = Linear()
    labels = correct_labels(model, images)
    attack = attacks.pgd(model, images, labels, 0.03, 0.0, 1.0, steps=10)
    assert model.rows[0] == 40 and len(model.rows) == 11
    assert model.rows == sorted(model.rows, reverse=True) and model.rows[-1] < 35
    assert model.rows[-1] >= 40 - attack.broken.numpy().sum() > 0
    # Once all are broken, nothing is asked any more.
    model.rows.clear()
    assert attacks.pgd(model, images, 1 - labels, 0.0, 0.0, 1.0, steps=10).broken.numpy().all()
    assert model.rows == [40]


def test_no_change_is_allowed_at_epsilon_zero(model, images):
    labels = correct_labels(model, images)
    labels[:5] = 1 - labels[:5]
    attack = attacks.pgd(model, images, labels, 0.0, 0.0, 1.0)
    np.testing.assert_array_equal(attack.images, images)
    np.testing.assert_array_equal(attack.broken, np.arange(40) < 5)
    np.testing.assert_array_equal(attacks.fgsm(model, images, labels, 0.0, 0.0, 1.0), images)


def test_the_start_depends_on_seed_and_image_alone(model, images):
    def blind(images):
        return tf.one_hot(tf.zeros(len(images), tf.int32), 2)

    def starts(images, **options):
        labels = np.zeros(len(images), np.int64)
        return attacks.pgd(blind, images, labels, np.float32([0.1, 0.2]), -9.0, 9.0, steps=1, **options).images.numpy()

    whole = starts(images, seed=3)
    np.testing.assert_array_equal(whole, starts(images, seed=3, indices=np.arange(40)))
    parts = [starts(images[rows], seed=3, indices=rows) for rows in np.split(np.arange(40), [7, 8])]
    np.testing.assert_array_equal(whole, np.concatenate(parts))
    assert (starts(images, seed=4) != whole).any(axis=(1, 2, 3)).all()
    # Uniform in the ball: 480 numbers a channel come near both ends.
    shift = (whole - images) / [0.1, 0.2]
    assert -1 - 1e-5 <= shift.min() < -0.98 and 0.98 < shift.max() <= 1 + 1e-5
    assert abs(shift.mean()) < 0.05 and abs(shift.std() - 3**-0.5) < 0.02
    np.testing.assert_array_equal(starts(images, random_start=False), images)


def test_a_compiled_attack_equals_an_eager_one(images):
    model = Linear()
    labels = correct_labels(model, images)
    low, high = np.zeros(2, np.float32), np.ones(2, np.float32)
    signature = [tf.TensorSpec([None, *SHAPE]), tf.TensorSpec([None], tf.int64), tf.TensorSpec([])]

    @tf.function(input_signature=signature)
    def compiled(images, labels, epsilon):
        return attacks.pgd(model, images, labels, epsilon, low, high), attacks.fgsm(
            model, images, labels, epsilon, low, high
        )

    for count in (40, 3, 0):
        attack, found = compiled(images[:count], labels[:count], 0.02)
        eager = attacks.pgd(model, images[:count], labels[:count], 0.02, low, high)
        np.testing.assert_array_equal(attack.broken, eager.broken)
        np.testing.assert_allclose(attack.images, eager.images, atol=1e-6)
        np.testing.assert_allclose(
            found, attacks.fgsm(model, images[:count], labels[:count], 0.02, low, high), atol=1e-6
        )


def test_the_gradient_is_that_of_each_images_cross_entropy(model, images):
    labels = np.arange(40) % 2
    logits, gradients = attacks.loss_gradient(model, images, labels)
    np.testing.assert_allclose(logits[:, 1], model.margins(images), atol=1e-5)
    # d/dx -log softmax_y = (softmax_1 - y) w, whatever the other images of the batch are.
    probability = 1 / (1 + np.exp(-model.margins(images)))
    expected = (probability - labels)[:, None, None, None] * model.weights
    np.testing.assert_allclose(gradients, expected, atol=1e-6)


def test_gradients_that_are_missing_or_not_finite_move_nothing(images):
    model = Linear()
    labels = correct_labels(model, images)
    for blind in (
        lambda x: model(tf.stop_gradient(x)),
        lambda x: model(tf.round(x)),
        # The gradient of sqrt at 0 is infinite.
        lambda x: model(x) + tf.reduce_sum(tf.sqrt(x - tf.stop_gradient(x)), axis=(1, 2, 3))[:, None] * [0.0, 1.0],
    ):
        found = attacks.fgsm(blind, images, labels, 0.02, 0.0, 1.0)
        np.testing.assert_array_equal(found, images)
        attack = attacks.pgd(blind, images, labels, 0.02, 0.0, 1.0, steps=2, random_start=False)
        np.testing.assert_array_equal(attack.images, images)


def test_another_source_gives_the_gradients_and_the_model_the_verdict(images):
    model, other = Linear(), Linear()
    other.weights[:, :2] *= -1
    labels = correct_labels(model, images)
    attack = attacks.pgd(model, images, labels, 0.03, -9.0, 9.0, steps=20, random_start=False, source_fn=other)
    np.testing.assert_array_equal(correct_labels(model, attack.images) != labels, attack.broken)
    # Where the model stands, the image went to the corner that is worst for the other model.
    towards = -np.where(labels == 1, 1, -1)[:, None, None, None] * np.sign(other.weights)
    standing = ~attack.broken.numpy()
    np.testing.assert_allclose(attack.images[standing], (images + 0.03 * towards)[standing], atol=1e-6)
    own = attacks.pgd(model, images, labels, 0.03, -9.0, 9.0)
    assert 0 < attack.broken.numpy().sum() < own.broken.numpy().sum()


def test_models_in_half_precision_are_attacked_in_full_precision(images):
    model = Linear()
    labels = correct_labels(model, images)

    def half(images):
        return tf.cast(model(images), tf.float16)

    assert attacks.fgsm(half, images.astype(np.float64), labels, 0.02, 0.0, 1.0).dtype == tf.float32
    attack = attacks.pgd(half, images, labels.astype(np.int32), 0.1, 0.0, 1.0)
    np.testing.assert_array_equal(attack.broken, worst_margins(model, images, labels, 0.1, 0.0, 1.0) < 0)


def test_an_operation_without_a_gradient_is_an_error_in_graphs_too(images):
    def factorised(images):
        return tf.raw_ops.Lu(input=images[:, :3, :3, 0])[0][:, 0, :2]

    labels = np.zeros(40, np.int64)
    for attack in (attacks.loss_gradient, tf.function(attacks.loss_gradient)):
        with pytest.raises(NotImplementedError, match="TensorFlow cannot differentiate the model"):
            attack(factorised, images, labels)


def test_impossible_arguments_are_refused(model, images):
    labels = correct_labels(model, images)
    for attack in (attacks.fgsm, attacks.pgd):
        with pytest.raises(ValueError, match=r"epsilon must be 0 or more. Received: epsilon=-0.1"):
            attack(model, images, labels, -0.1, 0.0, 1.0)
        with pytest.raises(ValueError, match=r"one per image. Received: labels of shape \(39,\) and type int64"):
            attack(model, images, labels[1:], 0.1, 0.0, 1.0)
        with pytest.raises(ValueError, match="labels must be integers"):
            attack(model, images, labels.astype(np.float32), 0.1, 0.0, 1.0)
    with pytest.raises(ValueError, match=r"`steps` must be an integer from 1 up. Received: steps=0"):
        attacks.pgd(model, images, labels, 0.1, 0.0, 1.0, steps=0)
    with pytest.raises(ValueError, match="`seed` must be an integer"):
        attacks.pgd(model, images, labels, 0.1, 0.0, 1.0, seed=-1)

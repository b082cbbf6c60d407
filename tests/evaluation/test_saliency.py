"""The suite `saliency`: references, baselines, what is left out, and the fixations of other images."""

import numpy as np
import pytest
import tensorflow as tf

from aib_tf import evaluation, maps
from aib_tf.evaluation.saliency import MEASURES, saliency
from aib_tf.evaluation.saliency_metrics import Fixations, measure

SIZE = 8
RANDOM = np.random.default_rng(0)
ATTENTION = RANDOM.uniform(size=(9, 4, 4)).astype(np.float32)
DENSITIES = RANDOM.uniform(size=(9, SIZE, SIZE)).astype(np.float32)
FIXATIONS = RANDOM.poisson(0.2, size=(9, SIZE, SIZE))


@pytest.fixture(autouse=True)
def eagerly():
    """So few pixels are not worth the compiled programs, which test_saliency_metrics.py sees to."""
    tf.config.run_functions_eagerly(True)
    yield
    tf.config.run_functions_eagerly(False)


@pytest.fixture
def measured(fake_model, batched):
    """The result on all images in batches of three, or as the caller says."""

    def measured(attention=ATTENTION, batch_size=3, reference=None, **fields):
        labels = np.zeros(len(attention), int)
        dataset = batched(labels, batch_size, SIZE, **fields)
        return saliency(fake_model(attention_mean=attention), dataset, reference=reference, resamples=50)

    return measured


def test_maps_and_baselines_are_compared_with_densities_and_fixations(measured):
    result = measured(saliency=DENSITIES, fixations=FIXATIONS, batch_size=9)
    everywhere = np.broadcast_to(maps.centred_gaussian(SIZE, SIZE, 0.25), DENSITIES.shape)
    compared = {
        "attention": maps.upsample(ATTENTION, SIZE, SIZE),
        "uniform": np.full(DENSITIES.shape, 0.3),
        "centred": everywhere,
    }
    assert set(result.metrics) == {f"{name}_{kind}" for name in MEASURES for kind in compared}
    fixations = Fixations.from_counts(FIXATIONS)
    for kind, found in compared.items():
        for name, scores in measure(np.float32(found), DENSITIES, fixations).items():
            np.testing.assert_allclose(result.per_image[f"{name}_{kind}"], scores, atol=1e-5)
            assert result[f"{name}_{kind}"].value == pytest.approx(np.mean(scores), abs=1e-5)
            assert result[f"{name}_{kind}"].images == 9
    assert result.details["reference"] == "saliency and fixations"


def test_the_uniform_baseline_is_at_chance(measured):
    result = measured(saliency=DENSITIES, fixations=FIXATIONS)
    chance = {"cc": 0, "nss": 0, "auc_judd": 0.5, "shuffled_auc": 0.5}
    for name, value in chance.items():
        np.testing.assert_allclose(result.per_image[f"{name}_uniform"], value, atol=1e-6)
    # KL from the uniform density is log(P) minus the entropy.
    q = DENSITIES.reshape(9, -1).astype(float)
    q /= q.sum(axis=1, keepdims=True)
    expected = np.log(SIZE**2) + (q * np.log(q)).sum(axis=1)
    np.testing.assert_allclose(result.per_image["kl_nats_uniform"], expected, atol=1e-5)


def test_a_map_that_is_the_reference_agrees_perfectly(measured):
    mask = np.zeros((9, SIZE, SIZE, 1), bool)
    for image in range(9):
        mask[image, image % 4 : image % 4 + 3, image % 5 : image % 5 + 2] = True
    result = measured(attention=mask[..., 0].astype(np.float32), mask=mask)
    assert result.details["reference"] == "mask"
    for name, value in {"cc": 1, "sim": 1, "kl_nats": 0, "auc_judd": 1}.items():
        np.testing.assert_allclose(result.per_image[f"{name}_attention"], value, atol=1e-5)
    # 6 of 64 pixels are 1: mean m = 6/64, standard deviation sqrt(m (1 - m)).
    share = 6 / 64
    np.testing.assert_allclose(result.per_image["nss_attention"], (1 - share) / np.sqrt(share * (1 - share)), rtol=1e-5)


def test_a_reference_can_be_named(measured):
    mask = np.ones((9, SIZE, SIZE, 1), bool)
    mask[:, 0] = False
    fields = {"saliency": DENSITIES, "fixations": FIXATIONS, "mask": mask}
    for reference, measures in [("saliency", MEASURES[:3]), ("fixations", MEASURES[3:]), ("mask", MEASURES)]:
        result = measured(reference=reference, **fields)
        assert {name.removesuffix("_attention") for name in result.metrics if "attention" in name} == set(measures)
        assert result.details["reference"] == reference
    assert measured(**fields).details["reference"] == "saliency and fixations"


def test_nonfixations_are_those_of_the_batch_and_of_the_batches_before(measured):
    result = measured(fixations=FIXATIONS)
    own = FIXATIONS.sum(axis=(1, 2))
    seen = np.array([own[: 3 * (image // 3 + 1)].sum() for image in range(9)])
    np.testing.assert_array_equal(result.per_image["nonfixations"], seen - own)
    assert result.details["nonfixations_fewest"] == (seen - own).min()
    assert result.details["nonfixations_most"] == (seen - own).max()
    # For the last image these are all others.
    enlarged = maps.upsample(ATTENTION[8], SIZE, SIZE)
    pairs = [
        (enlarged[mine] > enlarged[other]) + 0.5 * (enlarged[mine] == enlarged[other])
        for mine in map(tuple, np.argwhere(FIXATIONS[8]))
        for _ in range(FIXATIONS[8][mine])
        for others in FIXATIONS[:8]
        for other in map(tuple, np.argwhere(others))
        for _ in range(others[other])
    ]
    assert result.per_image["shuffled_auc_attention"][8] == pytest.approx(np.mean(pairs), abs=1e-6)


def test_the_last_images_do_not_depend_on_the_size_of_batches(measured):
    alone = measured(fixations=FIXATIONS, batch_size=1).per_image["shuffled_auc_attention"]
    together = measured(fixations=FIXATIONS, batch_size=9).per_image["shuffled_auc_attention"]
    assert np.isnan(alone[0]) and not np.isnan(together[0])
    assert alone[8] == pytest.approx(together[8], abs=1e-6)


def test_what_is_not_defined_is_left_out_and_counted(measured):
    fixations, densities = FIXATIONS.copy(), DENSITIES.copy()
    fixations[[1, 4]] = 0
    fixations[6] = 1
    densities[2] = 0.5
    result = measured(saliency=densities, fixations=fixations)
    left_out = {"cc": [2], "sim": [], "kl_nats": [], "nss": [1, 4], "auc_judd": [1, 4, 6], "shuffled_auc": [1, 4]}
    for name, images in left_out.items():
        for kind in ("attention", "uniform", "centred"):
            np.testing.assert_array_equal(np.flatnonzero(np.isnan(result.per_image[f"{name}_{kind}"])), images)
            assert result[f"{name}_{kind}"].images == 9 - len(images)
        assert result.details[f"{name}_left_out"] == len(images)


def test_constant_maps_have_values_and_are_counted(measured):
    attention = ATTENTION.copy()
    attention[[0, 5]] = 0.7
    attention[3] = 0
    result = measured(attention=attention, saliency=DENSITIES, fixations=FIXATIONS)
    assert result.details["constant_maps_attention"] == 3
    for name in MEASURES:
        np.testing.assert_allclose(
            result.per_image[f"{name}_attention"][[0, 3, 5]], result.per_image[f"{name}_uniform"][[0, 3, 5]], atol=1e-6
        )


def test_references_may_be_larger_than_the_image_and_differ_in_size(measured):
    large = np.repeat(np.repeat(DENSITIES, 2, axis=1), 3, axis=2)
    result = measured(saliency=large, fixations=FIXATIONS)
    expected = measure(np.float32(maps.upsample(ATTENTION, 16, 24)), large)["cc"]
    np.testing.assert_allclose(result.per_image["cc_attention"], expected, atol=1e-5)
    assert result["nss_attention"].images == 9


def test_a_model_with_gradients_gets_grad_cam_beside_its_attention(tiny_model):
    images = np.random.default_rng(0).uniform(size=(3, 8, 8, 1)).astype(np.float32)
    dataset = [{"image": images, "label": np.full(3, -1), "fixations": FIXATIONS[:3]}]
    result = saliency(tiny_model, dataset, resamples=20)
    assert "nss_grad_cam" in result.metrics
    expected = measure(tiny_model.explain(images)["attention_mean"], fixations=Fixations.from_counts(FIXATIONS[:3]))
    np.testing.assert_allclose(result.per_image["nss_attention"], expected["nss"], atol=1e-4)


def test_data_that_cannot_serve_are_named_as_such(measured):
    with pytest.raises(evaluation.UnavailableError, match="neither fixations nor reference maps nor masks"):
        measured()
    with pytest.raises(evaluation.UnavailableError, match="the data has no fixations"):
        measured(reference="fixations", saliency=DENSITIES)
    with pytest.raises(evaluation.UnavailableError, match="no image has fixations"):
        measured(fixations=np.zeros_like(FIXATIONS))


def test_a_plain_stand_in_has_no_maps(fake_model, batched):
    with pytest.raises(evaluation.UnavailableError):
        saliency(fake_model(logits=np.ones((9, 2))), batched(np.zeros(9, int), fixations=FIXATIONS))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"reference": "gaze", "fixations": FIXATIONS}, "reference.*saliency, fixations, mask.*gaze"),
        ({"fixations": FIXATIONS - 1}, "0 or more"),
        ({"fixations": FIXATIONS + 0.5}, "whole numbers"),
        ({"saliency": DENSITIES[..., None]}, r"'saliency' must have shape \(3, h, w\)"),
        ({"saliency": np.where(DENSITIES > 0.99, np.nan, DENSITIES)}, "NaN or infinity in 'saliency'"),
    ],
)
def test_bad_references_are_refused(measured, fields, message):
    with pytest.raises(ValueError, match=message):
        measured(**fields)

"""What a trained model reaches, and what it looks at."""

import numpy as np

from aib_tf import data, evaluation, visualization

_MEASURED_PIXELS = 32 * 224 * 224  # of a batch outside of training: 32 images for ImageNet, 250 of 32x32


def measuring_batch(info, replicas=1):
    """Images in a batch outside of training, few enough for the memory of any device; only draws depend on it."""
    height, width, _ = info.image_shape
    return replicas * max(1, min(250, _MEASURED_PIXELS // (height * width)))


def measure(model, config, split="test", samples=None, suites=None, baseline=None, **arguments):
    """Runs evaluation suites on a split of the data set of a run.

    Args:
        model: the trained model.
        config: the `Config` of the run.
        split: "train", "validation" or "test".
        samples: attention maps and latents drawn for each image; None takes the config's.
        suites: names of suites; None for those that take seconds: accuracy, with `samples` alone, bottleneck and
            localisation.
        baseline: classifier whose Grad-CAM stands beside the attention; None for the model itself.
        **arguments: `resamples`, `seed`, `options`, `folder`, `progress` of `aib_tf.evaluation.evaluate`.

    Returns:
        What `aib_tf.evaluation.evaluate` returns.
    """
    if suites is None:
        suites = evaluation.QUICK
        arguments.setdefault("options", {"accuracy": {"draws": ()}})
    images = config.data
    with data.naming_bad_examples(images.name, split, data_dir=images.data_dir, bad_examples=images.bad_examples):
        return evaluation.evaluate(
            subject(model, config, baseline),
            measured_images(config, split),
            suites=suites,
            samples=config.resolved().samples if samples is None else samples,
            **arguments,
        )


def subject(model, config, baseline=None):
    """The model of a run as the evaluation takes it, with the scale of its pixels.

    Args:
        model: the trained model.
        config: the `Config` of the run.
        baseline: classifier whose Grad-CAM stands beside the attention; None for the model itself.

    Returns:
        An `aib_tf.evaluation.Subject`.
    """
    info = _info(config)
    return evaluation.Subject(model, mean=info.mean, stddev=info.stddev, baseline=baseline)


def measured_images(config, split="test"):
    """The images of a split as the evaluation takes them: dicts of all that the data set knows of them."""
    batch = measuring_batch(_info(config))
    fields = _fields(config, "image", "label", "bbox", "mask")
    return _load(config, split, batch, fields=fields)


def draw_attention(model, config, path, split="test", count=16):
    """Draws images of a split with the attention of a model, the true box and the predicted class.

    Args:
        model: the trained model, with attention.
        config: the `Config` of the run.
        path: the PNG file.
        split: "train", "validation" or "test".
        count: number of images.
    """
    info = _info(config)
    fields = _fields(config, "image", "label", "bbox")
    dataset = _load(config, split, count, fields=fields, normalize=False)
    batch = next(iter(dataset))
    batch = batch if isinstance(batch, dict) else dict(zip(fields, batch, strict=True))
    batch = {name: value.numpy() for name, value in batch.items()}
    figure = attention_figure(
        model,
        batch["image"],
        data.normalize_images(batch["image"], info),
        labels=batch["label"],
        boxes=batch.get("bbox"),
        class_names=info.class_names,
    )
    visualization.save_figure(figure, path)


def attention_figure(model, pictures, images, **titles):
    """Draws the attention of a model for images.

    Args:
        model: a model with attention; of several maps, the deepest is drawn.
        pictures: uint8 images (B, H, W, channels).
        images: the same, normalised as the model takes them.
        **titles: `labels`, `class_names`, `boxes` or `titles` of `aib_tf.visualization.attention_grid`.

    Returns:
        A `matplotlib.figure.Figure`.
    """
    explanation = {name: np.asarray(value) for name, value in model.explain(images).items()}
    quantized = explanation.get("attention_quantized")
    return visualization.attention_grid(
        pictures,
        explanation[model.attention_names[-1]],
        quantized[0] if quantized is not None else None,
        predictions=explanation["logits"].argmax(-1),
        **titles,
    )


def _info(config):
    return data.get(config.data.name, config.data.data_dir)


def _load(config, split, batch_size, **options):
    images = config.data
    return data.load(images.name, split, batch_size, images.data_dir, bad_examples=images.bad_examples, **options)


def _fields(config, *wanted):
    available = _info(config).fields
    return tuple(field for field in wanted if field in available)

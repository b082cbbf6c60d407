"""What a trained model reaches, and what it looks at."""

import numpy as np

from aib_tf import data, evaluation, visualization

_MEASURED_PIXELS = 32 * 224 * 224  # of a batch outside of training: 32 images for ImageNet, 250 of 32x32


def measuring_batch(info, replicas=1):
    """Images in a batch outside of training, few enough for the memory of any device; no result depends on it."""
    height, width, _ = info.image_shape
    return replicas * max(1, min(250, _MEASURED_PIXELS // (height * width)))


def measure(model, config, split="test", samples=None, suites=None):
    """Runs the evaluation suites on a split of the data set of a run.

    Args:
        model: the trained model.
        config: the `Config` of the run.
        split: "train", "validation" or "test".
        samples: attention maps and latents drawn for each image; None takes the config's.
        suites: names of suites, None for all that there are.

    Returns:
        What `aib_tf.evaluation.evaluate` returns.
    """
    fields = _fields(config, "image", "label", "bbox", "mask")
    batch = measuring_batch(data.get(config.data.name))
    images = data.load(config.data.name, split, batch, config.data.data_dir, fields=fields)
    samples = config.resolved().samples if samples is None else samples
    return evaluation.evaluate(model, images, suites=suites, samples=samples)


def draw_attention(model, config, path, split="test", count=16):
    """Draws images of a split with the attention of a model, the true box and the predicted class.

    Args:
        model: the trained model, with attention.
        config: the `Config` of the run.
        path: the PNG file.
        split: "train", "validation" or "test".
        count: number of images.
    """
    info = data.get(config.data.name)
    fields = _fields(config, "image", "label", "bbox")
    dataset = data.load(config.data.name, split, count, config.data.data_dir, fields=fields, normalize=False)
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


def _fields(config, *wanted):
    available = data.get(config.data.name).fields
    return tuple(field for field in wanted if field in available)

"""The signatures of an exported model: what comes in, what goes out, and what is refused."""

import tensorflow as tf

from aib_tf.export.inference import MAX_SAMPLES

# Channels of what a JPEG or a PNG decodes to: grey, RGB.
_PICTURES = (1, 3)


def signatures_of(inference, preprocessing, image_dtype="float32"):
    """Makes the signatures that TensorFlow Serving offers.

    Args:
        inference: what `inference_of` returns.
        preprocessing: the `Preprocessing` of the images.
        image_dtype: "float32" or "uint8", the type of `images`.

    Returns:
        Dict of signature name -> `tf.function` with one concrete function, whose arguments are tensors by name and
        which returns a dict of tensors with a leading batch axis.
    """
    height, width, channels = preprocessing.image_shape
    images_spec = tf.TensorSpec((None, height, width, channels), image_dtype, "images")
    bytes_spec = tf.TensorSpec((None,), tf.string, "image_bytes")
    names = tf.constant(preprocessing.class_names)

    def pixels_of(images):
        return tf.cast(_checked(images, images_spec), tf.float32)

    def decoded(image_bytes):
        return preprocessing.decode(_checked(image_bytes, bytes_spec))

    def named(prediction):
        label = tf.argmax(prediction["probabilities"], axis=-1)
        return {**prediction, "label": label, "class_name": tf.gather(names, label)}

    def classified(prediction):
        return named({**prediction, "probabilities": tf.nn.softmax(prediction["logits"])})

    @tf.function(input_signature=[images_spec])
    def serving_default(images):
        return classified({"logits": inference.classify(pixels_of(images))})

    @tf.function(input_signature=[bytes_spec])
    def serve_bytes(image_bytes):
        return classified({"logits": inference.classify(tf.cast(decoded(image_bytes), tf.float32))})

    @tf.function(input_signature=[images_spec])
    def explain(images):
        explanation = inference.explain(pixels_of(images))
        maps = {
            f"{name}_image": tf.image.resize(value[..., None], (height, width))[..., 0]
            for name, value in explanation.items()
            if name.rstrip("0123456789") == "attention"
        }
        return classified({**explanation, **maps})

    @tf.function(
        input_signature=[images_spec, tf.TensorSpec(None, tf.int32, "samples"), tf.TensorSpec(None, tf.int32, "seed")]
    )
    def predict_mc(images, samples, seed):
        pixels = pixels_of(images)
        samples, seed = (_one_per_image(value, name, pixels) for value, name in ((samples, "samples"), (seed, "seed")))
        message = f"`samples` must be 1 to {MAX_SAMPLES}. Received: samples="
        valid = tf.reduce_all((samples >= 1) & (samples <= MAX_SAMPLES))
        with tf.control_dependencies([tf.debugging.Assert(valid, [message, samples])]):
            return named(inference.predict_mc(pixels, tf.identity(samples), seed))

    @tf.function(input_signature=[bytes_spec])
    def preprocess(image_bytes):
        return {"images": tf.cast(decoded(image_bytes), image_dtype)}

    signatures = [serving_default, explain]
    if channels in _PICTURES:
        signatures += [serve_bytes, preprocess]
    if inference.predict_mc is not None:
        signatures.append(predict_mc)
    return {signature.__name__: signature for signature in signatures}


def _checked(batch, spec):
    """Returns the batch, which has the shape of its spec and at least one row: a server feeds what it is given."""
    batch = tf.ensure_shape(batch, spec.shape)
    message = f"`{spec.name}` must hold at least one image. Received: {spec.name}.shape="
    shape = tf.shape(batch)
    with tf.control_dependencies([tf.debugging.Assert(shape[0] > 0, [message, shape])]):
        return tf.identity(batch)


def _one_per_image(value, name, images):
    """A scalar or a vector (B,) -> (B,)."""
    batch = tf.shape(images)[0]
    message = f"`{name}` must be a scalar or have one value per image. Received: {name}.shape="
    shape = tf.shape(value)
    valid = tf.reduce_all(tf.equal(shape, [batch])) & (tf.rank(value) <= 1)
    with tf.control_dependencies([tf.debugging.Assert(valid | (tf.rank(value) == 0), [message, shape])]):
        return tf.broadcast_to(tf.identity(value), [batch])

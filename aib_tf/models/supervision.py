"""Attention that is trained towards given maps, such as those of where people looked."""

import dataclasses

from keras import ops

from aib_tf.layers.gaussian import loss_dtype
from aib_tf.layers.reporting import keeps_metrics
from aib_tf.losses import attention_loss, check_attention_loss
from aib_tf.metrics import Mean
from aib_tf.ops.replicas import is_own, mark_own
from aib_tf.validation import check_weight


@dataclasses.dataclass(frozen=True)
class _Supervision:
    """Keras looks into tuples for layers and metrics, of which a built model takes no more; not into this."""

    kind: str
    weight: float
    metrics: tuple  # the one metric, or none where Keras keeps none


class SupervisedAttention:
    """What a classifier with attention needs for it to be trained towards given maps; a mixin for a `keras.Model`."""

    _supervision = None

    def supervise_attention(self, kind="kl", weight=1.0):
        """Adds to the loss how far the attention is from maps that are given with the images.

            loss = what it is without + weight * mean over the batch of attention_loss(A, map, kind)

        A is the mean map of a variational attention, before the quantizer and whatever is drawn; of several depths the
        deepest. From here on the model takes pairs (images, maps) in the place of images:

            maps: (B, H, W) or (B, H, W, 1), 0 or more, of any size and scale: a mask, or a density of fixations. It is
                averaged over the area of each position of the attention. An image without a map has one of zeros.

        Training needs them. With images alone, the model classifies as before; `explain` takes images alone. The loss
        and the metric `attention_loss`, its mean over the images that have a map and without the weight (0 where none
        has), cover evaluation with pairs as well. Under mixed precision Keras rounds maps of floats as it does images
        (float16 holds 1e-4 to 6e4: scale a density that is smaller), and leaves integers exact; the loss is computed in
        float32.

        This is a part of how the model is trained, and not of the model: it is not saved, and neither are weights
        added. After loading, call it again to go on. It may be called again, with another kind or weight. Under
        `tf.distribute` call it in the strategy's scope.

        Args:
            kind: "kl" (in bits), "cc" or "cosine", see `aib_tf.losses.attention_loss`.
            weight: weight of the loss, 0 or more; 0 measures it alone.

        Raises:
            ValueError: for another kind, a negative weight, or a model without attention.

        Example:
            >>> model = aib_tf.models.build("vgg_aib", (32, 32, 1), classes=10)
            >>> model.supervise_attention("kl", weight=0.1)
            >>> model.compile("adam", loss=aib_tf.losses.CrossEntropyBits())
            >>> model.fit((images, masks), labels, validation_data=((others, their_masks), their_labels))

        Reference:
            - Lai et al., "Understanding More about Human and Machine Attention in Deep Neural Networks", 2019.
        """
        check_attention_loss("kind", kind)
        weight = check_weight("weight", weight)
        if not self.attention_names:
            raise ValueError(
                "Only a model with attention can be trained towards given attention. Take one such as vgg_aib. "
                f"Received: model={self.name!r}"
            )
        metrics = (Mean(name="attention_loss", dtype="float32"),) if keeps_metrics() else ()
        self._supervision = _Supervision(kind, weight, metrics)
        # What Keras may have traced is without it.
        self.train_function = self.test_function = None

    @property
    def metrics(self):
        """The metrics of the model and its layers."""
        return [*super().metrics, *(self._supervision.metrics if self._supervision else ())]

    @property
    def losses(self):
        """What the model and its layers add to the loss, of this replica alone; a list of scalars."""
        return [loss for loss in super().losses if is_own(loss)]

    def _images_and_maps(self, inputs, training):
        """Takes the input of a call apart: images, and maps or None."""
        if isinstance(inputs, (tuple, list)):
            if self._supervision is None:
                raise ValueError(
                    "This model takes images alone. Call `supervise_attention` before it is trained with maps. "
                    f"Received: inputs={type(inputs).__name__} of length {len(inputs)}"
                )
            if len(inputs) != 2:
                raise ValueError(f"`inputs` must be images, or a pair of images and maps. Received: inputs={inputs!r}")
            return inputs
        if training and self._supervision is not None:
            raise ValueError(
                "`supervise_attention` was called, so that training needs pairs of images and maps; an image without a "
                f"map has one of zeros. Received: inputs.shape={tuple(inputs.shape)}"
            )
        return inputs, None

    def _add_attention_loss(self, attention, maps):
        """Adds the loss of a batch, and reports it."""
        values = attention_loss(attention, maps, self._supervision.kind)
        given = ops.any(ops.reshape(ops.cast(maps, "float32"), (ops.shape(values)[0], -1)) > 0, axis=1)
        for metric in self._supervision.metrics:
            metric.update_state(values, sample_weight=ops.cast(given, "float32"))
        # 0 for an empty batch, which tf.distribute can hand to a replica.
        mean = ops.sum(values) / ops.cast(ops.maximum(ops.shape(values)[0], 1), values.dtype)
        self.add_loss(mark_own(self._supervision.weight * ops.cast(mean, loss_dtype())))

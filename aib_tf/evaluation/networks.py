"""A look into Keras models: their layers in order, and what passes through one of them."""

import contextlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

import keras

from aib_tf.models.aib import AIBClassifier
from aib_tf.models.pay_attention import PayAttentionClassifier


class Call(NamedTuple):
    """One call of a layer: its positional arguments, and what it returned."""

    arguments: tuple
    output: object


@contextlib.contextmanager
def observed(layer, change: Callable = lambda output: output) -> Iterator[list[Call]]:
    """Collects the calls of a layer in a list, while the model around it runs or is traced.

    The layer's own `call` is covered by one that does so. This reaches every layer, in nested models and in models
    that are no graph of layers, without a copy of the model.

    Args:
        layer: a Keras layer.
        change: function of the layer's output whose result goes on into the model.
    """
    calls = []
    call = layer.call

    def observed_call(*arguments, **keywords):
        output = change(call(*arguments, **keywords))
        calls.append(Call(arguments, output))
        return output

    before = vars(layer).get("call")
    # Around Keras, which keeps track of what is assigned to a layer.
    object.__setattr__(layer, "call", observed_call)
    try:
        yield calls
    finally:
        object.__delattr__(layer, "call")
        if before is not None:
            object.__setattr__(layer, "call", before)


def layers_in_order(model) -> Iterator[keras.layers.Layer]:
    """The layers of a model in the order of its computation, nested models taken apart.

    That of models which are neither of this library nor functional or sequential is the order in which their layers
    were assigned to them.
    """
    if isinstance(model, AIBClassifier):
        parts = [model.features, model.attention, model.quantizer, model.encoder, model.bottleneck, model.decoder]
    elif isinstance(model, PayAttentionClassifier):
        parts = [model.features, *model.attentions, *model.classifiers]
    else:
        parts = model.layers
    for part in parts:
        if isinstance(part, keras.Model):
            yield from layers_in_order(part)
        elif part is not None:
            yield part


def logits_of(model, images):
    """Logits (or probabilities) of a Keras model by its means, as `explain` gives them where there is one.

    That is the computation of inference; a call would add losses, and count anchors in the metrics of training.
    """
    if callable(getattr(model, "explain", None)):
        return model.explain(images)["logits"]
    return model(images, training=False)

"""Whether a layer can report metrics of its own."""

import keras


def keeps_metrics():
    """Whether Keras keeps metrics that a layer updates in its call.

    On JAX it does not: during `fit` it takes the metrics' variables away and hands only the others to the layer, and
    an update fails. The layers then do without, rather than report zeros.
    """
    return keras.config.backend() != "jax"

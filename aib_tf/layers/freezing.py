"""What `trainable=False` means for a layer that is made of others."""


def freeze_inner_layers(layer):
    """Freezes the layers inside one that was made with `trainable=False`, as a saved frozen one is.

    Keras hands the attribute down when it is set, not when a layer is made, and a model around both trains what the
    inner ones hold.
    """
    if not layer.trainable:
        for inner in layer._flatten_layers(include_self=False, recursive=False):
            inner.trainable = False

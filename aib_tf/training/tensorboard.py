"""Logs for TensorBoard."""

import keras
import tensorflow as tf

from aib_tf import visualization
from aib_tf.training.callbacks import averaged_weights
from aib_tf.training.results import attention_figure


class TensorBoardLogs(keras.callbacks.Callback):
    """Writes scalars, a histogram of the anchors, attention overlays and the information plane after each epoch.

    Args:
        folder: folder of the logs.
        pictures: uint8 images (B, H, W, channels) to draw overlays for.
        images: the same, normalised as the model takes them.
        rows: the history with a dict for each epoch, this one included, as a `Recorder` keeps it.
    """

    def __init__(self, folder, pictures, images, rows):
        super().__init__()
        self.folder = folder
        self.pictures = pictures
        self.images = images
        self.rows = rows
        self._writer = None

    def on_train_begin(self, logs=None):
        self._writer = tf.summary.create_file_writer(str(self.folder))

    def on_epoch_end(self, epoch, logs=None):
        try:
            self._write(epoch, logs)
        except tf.errors.OpError as error:
            raise OSError(
                f"The logs for TensorBoard could not be written ({error.message}). Mend the cause; the same command "
                f"continues from the last checkpoint. Received: path={str(self.folder)!r}"
            ) from error

    def _write(self, epoch, logs):
        with self._writer.as_default(step=epoch + 1):
            for name, value in logs.items():
                split, name = ("validation", name[4:]) if name.startswith("val_") else ("train", name)
                tf.summary.scalar(f"{name}/{split}", value)
            tf.summary.scalar("learning_rate", self.rows[-1]["learning_rate"])
            if getattr(self.model, "quantizer", None) is not None:
                tf.summary.histogram("anchors", self.model.quantizer.anchors.value)
            if self.model.attention_names:
                with averaged_weights(self.model):
                    figure = attention_figure(self.model, self.pictures, self.images)
                tf.summary.image("attention", visualization.figure_to_array(figure)[None])
            history = {name: [row[name] for row in self.rows] for name in self.rows[0]}
            curves = visualization.figure_to_array(visualization.training_curves(history))
            tf.summary.image("curves_and_information_plane", curves[None])
        self._writer.flush()

    def on_train_end(self, logs=None):
        self._writer.close()

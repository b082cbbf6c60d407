"""Training by config: everything between a `Config` and a run folder."""

import dataclasses
import logging
import os

import keras
import numpy as np
import tensorflow as tf

from aib_tf import convert, data, evaluation, files, losses, metrics, models, visualization
from aib_tf.training.callbacks import (
    AveragedWeights,
    BetaWarmup,
    Recorder,
    StopAtNonFinite,
    StopRequest,
    StopWhenAsked,
    averaged_weights,
    keeps_average,
)
from aib_tf.training.optimizers import learning_rate_schedule, make_optimizer
from aib_tf.training.results import draw_attention, measure, measuring_batch
from aib_tf.training.run import Run
from aib_tf.training.tensorboard import TensorBoardLogs

_MONITOR = "val_accuracy"
_logger = logging.getLogger("aib_tf")


def fit(config, output_dir, verbose=1):
    """Trains a model, or continues where an earlier call stopped, and measures the best one on the test split.

    Args:
        config: an `aib_tf.config.Config`.
        output_dir: the run folder (`aib_tf.training.Run` says what is in it). If it holds a run with the same config,
            that run is continued; a finished one is left as it is.
        verbose: as for `keras.Model.fit`: 0 silent, 1 progress bar, 2 a line for each epoch.

    Returns:
        The history: dict name -> list with a number for each epoch, "val_" before those of the selection split.

    Raises:
        ValueError: for an unknown model or data set, or weights that do not fit, before anything is written.
        RunMismatchError: if the folder holds a run with another config.
        DatasetUnavailableError: if the images are not there and cannot be fetched.
        NonFiniteLossError: if the loss becomes NaN or infinite; what was saved stays.
        TrainingInterrupted: on Ctrl-C or SIGTERM, after saving.
    """
    run = Run(output_dir)
    config = run.resolve(_with_absolute_paths(config))
    if run.metrics_file.exists() and run.best_file.exists() and run.history_file.exists():
        _logger.info("This run is finished. Its results are in %s.", run.metrics_file)
        return run.read_history()
    info = data.get(config.data.name)
    keras.utils.set_random_seed(config.seed)
    if config.deterministic:
        tf.config.experimental.enable_op_determinism()
    model = _build(config, info)
    if config.samples and isinstance(model, models.PayAttentionClassifier):
        raise ValueError(
            f"The attention of {model.name} is deterministic: use samples=0. Received: samples={config.samples}"
        )
    batches = data.batches_per_epoch(
        config.data.name, _training_split(config), config.data.batch_size, config.data.data_dir
    )
    _compile(model, config, info, batches)
    fresh = not run.checkpoints.paths()
    if fresh:
        _load_weights(model, config)
    with run.locked():
        run.create(config)
        progress = run.checkpoints.restore(model)
        if not fresh and not progress.epoch and not progress.batch:
            _load_weights(model, config)  # no checkpoint was whole: training starts over
        if progress.rows:
            run.write_history(progress.rows)
        if progress.epoch or progress.batch:
            _logger.info(
                "Continuing %s after epoch %d of %d, batch %d of %d.",
                run.path,
                progress.epoch,
                config.optimization.epochs,
                progress.batch,
                batches,
            )
        if progress.epoch < config.optimization.epochs:
            _train(model, config, info, run, progress, batches, verbose)
        _finish(run, config, model, progress)
    return run.read_history()


def _with_absolute_paths(config):
    """The config as it has to stand in the run folder, which is read from other working directories."""
    folder, weights = config.data.data_dir, config.model.weights
    if folder is not None and "://" not in folder:
        config = dataclasses.replace(
            config, data=dataclasses.replace(config.data, data_dir=os.path.abspath(os.path.expanduser(folder)))
        )
    if weights not in (None, "imagenet"):
        config = dataclasses.replace(
            config, model=dataclasses.replace(config.model, weights=os.path.abspath(os.path.expanduser(weights)))
        )
    return config


def _training_split(config):
    """The images to train on: where none are needed to choose a checkpoint, those of validation too."""
    return "train+validation" if config.select_on == "test" else "train"


def _load_weights(model, config):
    """Gives the backbone the weights for ImageNet, where a recipe starts with them."""
    if config.model.weights is not None:
        source = convert.fetch_imagenet(model) if config.model.weights == "imagenet" else config.model.weights
        convert.load_backbone(source, model)


def _build(config, info):
    policy = keras.config.dtype_policy()
    keras.config.set_dtype_policy(config.precision)
    try:
        return models.build(
            config.model.name,
            info.image_shape,
            info.classes,
            width=config.model.width,
            latent_dim=config.model.latent_dim,
            num_anchors=config.model.num_anchors,
            dropout=config.model.dropout,
            initializers=config.model.initializers,
            attention=config.model.attention,
            combine=config.model.combine,
            position=config.model.position,
            normalize=config.model.normalize,
            beta=config.objective.beta,
            kl=config.objective.kl,
            kl_weight=config.objective.kl_weight,
            codebook_weight=config.objective.codebook_weight,
            commitment_weight=config.objective.commitment_weight,
            seed=config.seed,
        )
    finally:
        keras.config.set_dtype_policy(policy)


def _compile(model, config, info, batches):
    model.compile(
        make_optimizer(config.optimization, batches),
        loss=losses.CrossEntropyBits(),
        metrics=["accuracy", metrics.CrossEntropyBits(), metrics.LabelInformation(info.classes)],
        jit_compile={"auto": "auto", "true": True, "false": False}[config.jit_compile],
    )
    # Variables that Keras makes at the first step have to be there before: a checkpoint may hold values for them.
    model.optimizer.build(model.trainable_variables)
    model.compute_metrics(None, np.zeros(1), np.zeros((1, info.classes), "float32"))
    model.reset_metrics()


def _train(model, config, info, run, progress, batches, verbose):
    source = config.data
    epochs = config.optimization.epochs
    stream = data.training_batches(
        source.name,
        _training_split(config),
        source.batch_size,
        first_epoch=progress.epoch,
        skip_batches=progress.batch,
        epochs=epochs,
        seed=config.seed,
        augment=source.augment,
        data_dir=source.data_dir,
    )
    selection = data.load(source.name, config.select_on, measuring_batch(info), source.data_dir)
    pictures = next(iter(data.load(source.name, config.select_on, 8, source.data_dir, normalize=False)))[0].numpy()
    learning_rate = learning_rate_schedule(config.optimization, batches)
    stop = StopRequest()
    callbacks = [
        AveragedWeights(),
        BetaWarmup(round(config.objective.beta_warmup_epochs * batches)),
        StopAtNonFinite(),
        Recorder(run, progress, batches, _MONITOR, learning_rate, stop),
        TensorBoardLogs(run.tensorboard_folder, pictures, data.normalize_images(pictures, info), progress.rows),
        StopWhenAsked(stop),
    ]
    iterator = stream
    stop.listen()
    try:
        if progress.batch:
            # The rest of an epoch has fewer steps than the others, so it is a `fit` of its own.
            remaining = batches - progress.batch
            epoch = progress.epoch
            _fit(run, model, iterator.take(remaining), selection, callbacks, epoch, epoch + 1, remaining, verbose)
            iterator = stream.skip(remaining)
        if progress.epoch < epochs:
            _fit(run, model, iterator, selection, callbacks, progress.epoch, epochs, batches, verbose)
    finally:
        stop.close()


def _fit(run, model, stream, selection, callbacks, first_epoch, epochs, steps, verbose):
    model.fit(
        stream,
        initial_epoch=first_epoch,
        epochs=epochs,
        steps_per_epoch=steps,
        shuffle=False,  # Keras warns otherwise: a tf.data pipeline has its own order
        validation_data=selection,
        callbacks=callbacks,
        verbose=verbose,
    )
    if keeps_average(model):
        # At its end Keras leaves the average in the model; training goes on with the weights.
        run.checkpoints.restore(model)


def _finish(run, config, last_model, progress):
    """Measures the best model on the test split, and draws what it looks at."""
    if not run.best_file.exists():
        _logger.warning("%s is missing; the model of the last epoch takes its place.", run.best_file)
        with files.replacing(run.best_file) as path, averaged_weights(last_model):
            last_model.save(path)
        row = progress.rows[-1]
        files.write_json(run.best_info_file, {"epoch": row["epoch"], "monitor": _MONITOR, "value": row[_MONITOR]})
    model = run.load_best()
    visualization.save_figure(visualization.training_curves(run.read_history()), run.curves_file)
    if model.attention_names:
        draw_attention(model, config, run.attention_file)
    results = measure(model, config)
    best = run.best or max(
        ({"epoch": row["epoch"], "monitor": _MONITOR, "value": row[_MONITOR]} for row in progress.rows),
        key=lambda candidate: candidate["value"],
    )
    _logger.info(
        "The best model is that of epoch %d, %s %.4f. On the test split:\n\n%s\n",
        best["epoch"],
        best["monitor"],
        best["value"],
        evaluation.report.table(results),
    )
    # Written last: a run that has it is finished.
    evaluation.report.write_json(run.metrics_file, results, run=str(run.path), split="test", best=best)

"""Training by config: everything between a `Config` and a run folder."""

import contextlib
import dataclasses
import json
import logging

import keras
import numpy as np
import tensorflow as tf

from aib_tf import convert, data, evaluation, files, losses, metrics, models, visualization
from aib_tf.config import LEARNING_RATE_SCALINGS, Config, differences
from aib_tf.models.registry import look_up
from aib_tf.optimizers import learning_rate_schedule, make_optimizer
from aib_tf.training import distribution
from aib_tf.training.callbacks import (
    AveragedWeights,
    BetaWarmup,
    Profiler,
    Recorder,
    SharedStatistics,
    StopAtNonFinite,
    StopRequest,
    StopWhenAsked,
    averaged_weights,
    keeps_average,
)
from aib_tf.training.checkpoints import Progress
from aib_tf.training.cluster import ClusterError
from aib_tf.training.results import draw_attention, measure, measuring_batch
from aib_tf.training.run import Run
from aib_tf.training.supervision import maps_field, with_maps
from aib_tf.training.tensorboard import TensorBoardLogs

_MONITOR = "val_accuracy"
_logger = logging.getLogger("aib_tf")


def fit(config, output_dir, verbose=1):
    """Trains a model, or continues where an earlier call stopped, and measures the best one on the test split.

    `config.execution.strategy` says on which devices. On several machines each calls this with the same config; the
    first one, the chief, reads and writes the run folder, which the others need not see.

    Args:
        config: an `aib_tf.config.Config`.
        output_dir: the run folder (`aib_tf.training.Run` says what is in it). If it holds a run with the same config,
            that run is continued, on other devices too; a finished one is left as it is.
        verbose: as for `keras.Model.fit`: 0 silent, 1 progress bar, 2 a line for each epoch. The chief alone speaks.

    Returns:
        The history: dict name -> list with a number for each epoch, "val_" before those of the selection split.

    Raises:
        ValueError: for an unknown model or data set, weights that do not fit, a batch that the devices cannot share, or
            attention to be trained towards maps that are not there, before anything is written.
        RunMismatchError: if the folder holds a run with another config.
        ClusterError: if devices or workers are not there, or are not alike, or one of them cannot start.
        BadExampleError: if an example cannot be used, and `config.data.bad_examples` is not "skip".
        DatasetUnavailableError: if the images are not there and cannot be fetched, or are damaged.
        OSError: if the folder cannot be written to, or its disk has no room for the run.
        NonFiniteLossError: if the loss becomes NaN or infinite; what was saved stays.
        WorkerLostError: if another worker is gone; what was saved stays.
        TrainingInterrupted: on Ctrl-C or SIGTERM, after saving.
    """
    info = data.get(config.data.name, config.data.data_dir)
    look_up(config.model.name)
    workers = distribution.Workers(distribution.strategy(config.execution.strategy))
    with workers.watched():
        return _Fit(config, Run(output_dir, config.execution.checkpoints_kept), info, workers, verbose).run()


class _Fit:
    """One call of `fit`; of several workers, each makes one and takes the same way through it."""

    def __init__(self, config, run, info, workers, verbose):
        self.config = config
        self.folder = run
        self.info = info
        self.workers = workers
        self.verbose = verbose if workers.is_chief else 0
        self.model = None
        self.batches = None
        self.maps = None  # the field with the maps that attention is trained towards, if any
        self.fresh = None  # whether there is no checkpoint, so that training starts with the weights of a recipe

    def run(self):
        workers, folder = self.workers, self.folder
        self._resolve()
        if workers.from_chief(lambda: folder.is_finished):
            self._log("This run is finished. Its results are in %s.", folder.metrics_file)
            return workers.from_chief(folder.read_history)
        self.fresh = workers.from_chief(lambda: not folder.checkpoints.paths())
        workers.together(self._check)
        workers.together(self._prepare)
        if workers.replicas > 1:
            kind = "GPUs" if tf.config.get_visible_devices("GPU") else "CPUs"
            self._log("Training on %d %s of %d workers.", workers.replicas, kind, workers.size)
        with contextlib.ExitStack() as lock:
            workers.from_chief(lambda: self._create(lock))
            progress = self._restore()
            epochs = self.config.optimization.epochs
            if progress.rows:
                workers.from_chief(lambda: folder.write_history(progress.rows))
            if progress.epoch or progress.batch:
                self._log(
                    "Continuing %s after epoch %d of %d, batch %d of %d.",
                    folder.path,
                    progress.epoch,
                    epochs,
                    progress.batch,
                    self.batches,
                )
            if progress.epoch < epochs:
                self._train(progress)
            workers.from_chief(lambda: self._finish(progress))
        return workers.from_chief(folder.read_history)

    def _resolve(self):
        """Brings the workers to one config, that of the run."""
        given = _with_absolute_paths(self.config)
        texts = self.workers.gather(json.dumps(given.to_dict()))
        for index, text in enumerate(texts):
            found = differences(
                Config.from_dict(json.loads(texts[0])), Config.from_dict(json.loads(text)), ("data_dir",)
            )
            if found:
                raise ClusterError(
                    f"Workers differ. Give all of them the same flags. Received (worker 0 -> worker {index}): "
                    + "; ".join(found)
                )
        config = Config.from_dict(self.workers.from_chief(lambda: self.folder.resolve(given).to_dict()))
        # Each machine may have the images elsewhere.
        images = dataclasses.replace(config.data, data_dir=given.data.data_dir)
        self.config = dataclasses.replace(config, data=images)

    def _check(self):
        """Looks for what may be wrong with one worker alone, before they build the model together."""
        config = self.config
        if config.objective.attention_supervision != "none":
            self.maps = maps_field(self.info, config.data.augment)
        self.batches = data.batches_per_epoch(
            config.data.name,
            _training_split(config),
            config.data.batch_size,
            config.data.data_dir,
            shards=self.workers.shards,
            bad_examples=config.data.bad_examples,
        )
        steps = config.execution.steps_per_execution
        if self.batches % steps:
            near = min((d for d in range(1, self.batches + 1) if self.batches % d == 0), key=lambda d: abs(d - steps))
            raise ValueError(
                f"An epoch has {self.batches} steps, of which `steps_per_execution` must be a divisor, such as {near}. "
                f"Received: steps_per_execution={steps}"
            )
        if self.workers.replicas > 1:
            for name, value, allowed in (
                ("steps_per_execution", steps, 1),
                ("jit_compile", config.jit_compile, "auto"),
            ):
                if value not in (allowed, "false"):
                    raise ValueError(
                        f"Keras and TensorFlow cannot train so on several devices. Use {name}={allowed}, or "
                        f"strategy=one_device. Received: {name}={value} on {self.workers.replicas} devices"
                    )

    def _prepare(self):
        """Builds the model, whose first weights the workers exchange, and loads those of a recipe."""
        config = self.config
        keras.utils.set_random_seed(config.seed)
        if config.deterministic:
            tf.config.experimental.enable_op_determinism()
        with self.workers.strategy.scope():
            self.model = _build(config, self.info)
            if config.samples and isinstance(self.model, models.PayAttentionClassifier):
                raise ValueError(
                    f"The attention of {self.model.name} is deterministic: use samples=0. "
                    f"Received: samples={config.samples}"
                )
            if self.maps is not None:
                self.model.supervise_attention(
                    config.objective.attention_supervision, config.objective.attention_supervision_weight
                )
            _compile(self.model, config, self.info, self.batches, self.workers.replicas)
            if self.fresh:
                _load_weights(self.model, config)

    def _create(self, lock):
        lock.enter_context(self.folder.locked())
        self.folder.check_storage(self.model, self.config.optimization.epochs)
        self.folder.create(self.config, self.workers.replicas)

    def _restore(self):
        """Gives every worker what the chief finds in the newest checkpoint."""
        arrays, progress = {}, Progress()

        def read():
            nonlocal arrays, progress
            arrays, progress = self.folder.checkpoints.read_newest() or (arrays, progress)
            place = {"epoch": progress.epoch, "batch": progress.batch, "rows": progress.rows}
            return place, list(arrays), list(progress.metrics)

        place, names, metric_names = self.workers.from_chief(read)
        values = self.workers.arrays_from_chief([*arrays.values(), *progress.metrics.values()])
        if names:
            self.workers.together(
                lambda: self.folder.checkpoints.apply(self.model, dict(zip(names, values, strict=False)))
            )
        elif not self.fresh:
            self.workers.together(lambda: _load_weights(self.model, self.config))  # no checkpoint was whole
        return Progress(**place | {"metrics": dict(zip(metric_names, values[len(names) :], strict=True))})

    def _train(self, progress):
        config, workers, batches = self.config, self.workers, self.batches
        source, optimization, execution = config.data, config.optimization, config.execution
        epochs = optimization.epochs
        # On more devices than before, a small last batch may have joined the one before it.
        progress.batch = min(progress.batch, batches - 1)
        fields = ("image", "label") if self.maps is None else ("image", "label", self.maps)
        stream = data.training_batches(
            source.name,
            _training_split(config),
            source.batch_size,
            first_epoch=progress.epoch,
            skip_batches=progress.batch,
            epochs=epochs if workers.replicas == 1 else None,
            seed=config.seed,
            augment=source.augment,
            data_dir=source.data_dir,
            fields=fields,
            shards=workers.shards,
            bad_examples=source.bad_examples,
        )
        size = measuring_batch(self.info, workers.replicas)
        options = {"bad_examples": source.bad_examples}
        selection = data.load(
            source.name, config.select_on, size, source.data_dir, fields=fields, shards=workers.shards, **options
        )
        if self.maps is not None:
            stream, selection = with_maps(stream, self.maps), with_maps(selection, self.maps)
        stop = StopRequest()
        calls = batches // execution.steps_per_execution
        profiler = Profiler(self.folder.tensorboard_folder, first_step=min(10, calls // 2))
        callbacks = [
            SharedStatistics(workers),
            AveragedWeights(),
            BetaWarmup(round(config.objective.beta_warmup_epochs * batches)),
            StopAtNonFinite(),
            Recorder(
                self.folder,
                workers,
                progress,
                batches_per_epoch=batches,
                steps_per_execution=execution.steps_per_execution,
                checkpoint_seconds=60.0 * execution.checkpoint_minutes,
                monitor=_MONITOR,
                learning_rate=learning_rate_schedule(_scaled(optimization, workers.replicas), batches),
                stop=stop,
            ),
        ]
        if workers.is_chief:
            pictures = data.load(source.name, config.select_on, 8, source.data_dir, normalize=False, **options)
            pictures = next(iter(pictures))[0].numpy()
            images = data.normalize_images(pictures, self.info)
            folder = self.folder.tensorboard_folder
            callbacks.append(TensorBoardLogs(folder, pictures, images, progress.rows))
            if execution.profile:
                callbacks.append(profiler)
        callbacks.append(StopWhenAsked(stop))
        stop.listen()
        try:
            if progress.batch:
                # The rest of an epoch has fewer steps than the others, so it is a `fit` of its own.
                remaining = batches - progress.batch
                elements = remaining * workers.shards.count
                self._fit(stream, selection, callbacks, progress.epoch, progress.epoch + 1, remaining)
                stream = stream.skip(elements)
            if progress.epoch < epochs:
                self._fit(stream, selection, callbacks, progress.epoch, epochs, batches)
        finally:
            stop.close()
            profiler.close()

    def _fit(self, stream, selection, callbacks, first_epoch, epochs, steps):
        validation_steps = None
        if self.workers.replicas > 1:
            validation_steps = selection.cardinality().numpy() // self.workers.shards.count
            selection = selection.repeat()
        source = self.config.data
        splits = _training_split(self.config), self.config.select_on
        with data.naming_bad_examples(source.name, *splits, data_dir=source.data_dir, bad_examples=source.bad_examples):
            self.model.fit(
                self.workers.distribute(stream),
                initial_epoch=first_epoch,
                epochs=epochs,
                steps_per_epoch=steps,
                shuffle=False,  # Keras warns otherwise: a tf.data pipeline has its own order
                validation_data=self.workers.distribute(selection),
                validation_steps=validation_steps,
                callbacks=callbacks,
                verbose=self.verbose,
            )
        if keeps_average(self.model):
            # At its end Keras leaves the average in the model; training goes on with the weights.
            self._restore()

    def _finish(self, progress):
        """Measures the best model on the test split, and draws what it looks at."""
        run, config = self.folder, self.config
        run.checkpoints.wait()  # that the last one could not be written is told before the run counts as finished
        if not run.best_file.exists():
            _logger.warning("%s is missing; the model of the last epoch takes its place.", run.best_file)
            with files.replacing(run.best_file) as path, averaged_weights(self.model):
                self.model.save(path)
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

    def _log(self, message, *values):
        if self.workers.is_chief:
            _logger.info(message, *values)


def _with_absolute_paths(config):
    """The config as it has to stand in the run folder, which is read from other working directories."""
    folder, weights = config.data.data_dir, config.model.weights
    if folder is not None:
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, data_dir=files.absolute(folder)))
    if weights not in (None, "imagenet"):
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, weights=files.absolute(weights)))
    return config


def _training_split(config):
    """The images to train on: where none are needed to choose a checkpoint, those of validation too."""
    return "train+validation" if config.select_on == "test" else "train"


def _load_weights(model, config):
    """Gives the backbone the weights for ImageNet, where a recipe starts with them."""
    if config.model.weights is not None:
        source = convert.fetch_imagenet(model) if config.model.weights == "imagenet" else config.model.weights
        with files.local_copy(source) as path:
            convert.load_backbone(path, model)


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
            synchronized_batch_norm=config.model.synchronized_batch_norm,
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


def _compile(model, config, info, batches, replicas):
    model.compile(
        make_optimizer(_scaled(config.optimization, replicas), batches),
        loss=losses.CrossEntropyBits(),
        metrics=["accuracy", metrics.CrossEntropyBits(), metrics.LabelInformation(info.classes)],
        steps_per_execution=config.execution.steps_per_execution,
        jit_compile={"auto": "auto", "true": True, "false": False}[config.jit_compile],
    )
    # Variables that Keras makes at the first step have to be there before: a checkpoint may hold values for them.
    model.optimizer.build(model.trainable_variables)
    model.compute_metrics(None, np.zeros(1), np.zeros((1, info.classes), "float32"))
    model.reset_metrics()


def _scaled(optimization, replicas):
    """The settings of the optimizer with learning rates for a number of devices."""
    factor = LEARNING_RATE_SCALINGS[optimization.learning_rate_scaling](replicas)
    return dataclasses.replace(
        optimization,
        learning_rate=optimization.learning_rate * factor,
        warmup_learning_rates=tuple(rate * factor for rate in optimization.warmup_learning_rates),
    )

"""What the scripts share: flags from the config's fields, and errors as one message instead of a traceback."""

import dataclasses
import logging
import os
import signal
import sys
import types
import typing

# Before TensorFlow is imported: it reads this once.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import absl.logging
from absl import app, flags

from aib_tf.config import Config, settings

# EX_TEMPFAIL of sysexits.h: what was saved stays, and the same command continues. Launchers and clusters know it.
REPEAT = 75

_DEFINE = {bool: flags.DEFINE_bool, int: flags.DEFINE_integer, float: flags.DEFINE_float, str: flags.DEFINE_string}


def define_config_flags():
    """Defines one flag for each setting of a `Config`, with its default and its help."""
    for name, field, kind in _typed_settings():
        if typing.get_origin(kind) is tuple:
            flags.DEFINE_list(name, list(field.default), field.metadata["help"] + " Separated by commas.")
        else:
            _DEFINE[kind](name, field.default, field.metadata["help"])


def config_from_flags():
    """Makes the `Config` that the flags describe."""
    values = {}
    for name, _, kind in _typed_settings():
        value = flags.FLAGS[name].value
        if typing.get_origin(kind) is tuple:
            value = _numbers(name, value, typing.get_args(kind)[0])
        values[name] = value
    return Config.from_flat(values)


def config_flag_names():
    """Names of the flags that `define_config_flags` defines."""
    return [name for name, _, _ in _typed_settings()]


def run(main):
    """Runs a script: parses the flags, calls `main(arguments)`, and turns the errors a user can mend into messages."""
    _log_to_stderr()
    sys.stdout.reconfigure(errors="backslashreplace")  # as stderr has it: the name of a file need not be UTF-8
    app.run(lambda arguments: _guarded(main, arguments[1:]), flags_parser=_parse)


def open_run(folder, data_dir):
    """Opens a run folder for a script that reads it.

    Returns:
        The `Run`, and its config with `data_dir` in the place of its own unless that is None.
    """
    from aib_tf.training import Run

    found = Run(folder)
    config = found.config
    if data_dir is not None:
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, data_dir=data_dir))
    return found, config


def _parse(arguments):
    try:
        return flags.FLAGS(arguments)
    except flags.UnrecognizedFlagError as error:
        ours = [flag.name for module in (sys.argv[0], __name__) for flag in _flags_of(module)]
        known = sorted({*ours, "flagfile"})
        _fail(f"{error}\nThe flags are: {', '.join('--' + name for name in known)}.")
    except flags.Error as error:
        _fail(str(error))
    except UnicodeDecodeError as error:
        given = [argument for argument in arguments if argument.lstrip("-").startswith("flagfile")]
        _fail(f"A flagfile is text in UTF-8, and this one is not: {error}. Received: {' '.join(given)}")


def _flags_of(module):
    return flags.FLAGS.get_flags_for_module(module)


def _guarded(main, arguments):
    from aib_tf.convert import CheckpointError
    from aib_tf.data import DatasetUnavailableError
    from aib_tf.evaluation import UnavailableError
    from aib_tf.training import (
        ClusterError,
        NonFiniteLossError,
        RunMismatchError,
        TrainingInterrupted,
        WorkerLostError,
    )
    from aib_tf.training.cluster import MissingWorkerError

    absl.logging.set_verbosity(absl.logging.WARNING)  # TensorFlow Datasets tells every step
    try:
        main(arguments)
    except TrainingInterrupted as stop:
        if stop.signal != "SIGINT":
            # Another worker may have been asked first. Our own signal then is still on its way, and has nothing to say.
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        print(f"\n{stop}", file=sys.stderr)
        sys.exit(130 if stop.signal == "SIGINT" else REPEAT)
    except (WorkerLostError, MissingWorkerError) as error:
        _fail(str(error), code=REPEAT)
    except KeyboardInterrupt:
        print("\nStopped.", file=sys.stderr)
        sys.exit(130)
    except OSError as error:
        if isinstance(error, DatasetUnavailableError) or error.filename is None:
            _fail(str(error), code=1)
        _fail(f"{error.strerror}: {error.filename}", code=1)
    except (CheckpointError, ClusterError, NonFiniteLossError, RunMismatchError, UnavailableError) as error:
        _fail(str(error), code=1)
    except (ValueError, TypeError) as error:
        # Errors of our own name what they received; any other is a defect, and its traceback helps to find it.
        if "Received:" not in str(error) or _raised_outside(error):
            raise
        _fail(str(error))


def _raised_outside(error):
    """Whether the innermost frame of an error is not in this project."""
    trace = error.__traceback__
    while trace.tb_next is not None:
        trace = trace.tb_next
    name = trace.tb_frame.f_globals.get("__name__", "")
    return not (name == "__main__" or name.split(".")[0] in ("aib_tf", "command_line"))


def _fail(message, code=2):
    print(f"{os.path.basename(sys.argv[0])}: {message}", file=sys.stderr)
    sys.exit(code)


def _log_to_stderr():
    logger = logging.getLogger("aib_tf")
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False


def _numbers(name, texts, kind):
    try:
        return tuple(kind(text) for text in texts)
    except ValueError:
        raise ValueError(
            f"`{name}` must be numbers ({kind.__name__}) separated by commas. Received: {name}={','.join(texts)}"
        ) from None


def _typed_settings():
    """Yields (flag name, dataclass field, its type without None) of every setting."""
    for section, name, field in settings():
        kind = typing.get_type_hints(type(getattr(Config(), section)) if section else Config)[field.name]
        if isinstance(kind, types.UnionType):
            (kind,) = (option for option in typing.get_args(kind) if option is not type(None))
        yield name, field, kind

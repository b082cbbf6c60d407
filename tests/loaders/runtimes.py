"""Runtimes that answer requests to SavedModels: processes of their own, without the code of the exporter."""

import dataclasses
import json
import os
import shlex
import shutil
import subprocess
from pathlib import Path

import numpy as np
import tensorflow as tf
from tensorflow.core.protobuf import saved_model_pb2

HERE = Path(__file__).parent


@dataclasses.dataclass(frozen=True)
class Request:
    """What a client asks: a signature of the SavedModel at a path, and its inputs; strings are arrays of bytes."""

    path: str
    signature: str
    inputs: dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Refusal:
    """The error that a runtime answered with."""

    kind: str
    message: str


@dataclasses.dataclass(frozen=True)
class Answers:
    """What a runtime answered.

    Attributes:
        outputs: for each request a dict of arrays, by the names of the signature, or a `Refusal`.
        facts: what a Python process says of itself.
    """

    outputs: list
    facts: dict


def ask_python(python, script, requests, folder):
    """Has a script of this folder answer, in an isolated Python that runs in an empty folder.

    Args:
        python: the interpreter.
        script: name of a file of this folder.
        requests: list of `Request`.
        folder: an empty folder for what goes to and fro.

    Raises:
        AssertionError: if the process fails.
    """
    (folder / "requests.json").write_text(
        json.dumps([[each.path, each.signature, sorted(each.inputs)] for each in requests])
    )
    arrays = {f"{i}/{name}": value for i, each in enumerate(requests) for name, value in each.inputs.items()}
    np.savez(folder / "requests.npz", **arrays)
    # -I: neither PYTHONPATH nor the folder of the script or of the caller is where it looks for modules.
    _run([python, "-I", "-W", "ignore", str(HERE / script), str(folder)], folder)
    facts = json.loads((folder / "answers.json").read_text())
    outputs = [{} for _ in requests]
    with np.load(folder / "answers.npz") as answers:
        for key, value in answers.items():
            number, _, name = key.partition("/")
            outputs[int(number)][name] = value
    for number, refusal in facts["errors"].items():
        outputs[int(number)] = Refusal(*refusal)
    return Answers(outputs, facts)


def c_compiler():
    """The command of the C compiler, or None."""
    command = shlex.split(os.environ.get("CC", "cc"))
    return command if shutil.which(command[0]) else None


def compile_c_program(folder):
    """Compiles load_saved_model.c against the installed TensorFlow, and returns the program's path."""
    program = folder / "load_saved_model"
    libraries = Path(tf.sysconfig.get_lib())
    _run(
        [
            *c_compiler(),
            *("-std=c11", "-O1", "-Wall", "-Wextra", "-Werror", f"-isystem{tf.sysconfig.get_include()}"),
            str(HERE / "load_saved_model.c"),
            *("-o", str(program), f"-L{libraries}", f"-Wl,-rpath,{libraries}"),
            *("-l:libtensorflow_cc.so.2", "-l:libtensorflow_framework.so.2"),
        ],
        folder,
    )
    return program


def ask_c_program(program, requests, folder):
    """Has the compiled load_saved_model.c answer, which reads the names of tensors here."""
    paths = list(dict.fromkeys(each.path for each in requests))
    signatures = {path: read_signatures(path) for path in paths}
    asked = [signatures[each.path][each.signature] for each in requests]
    words = [
        f"{paths.index(each.path)} {_in_words(each, signature)}\n"
        for each, signature in zip(requests, asked, strict=True)
    ]
    lines = _run([str(program), *paths], folder, stdin="".join(words)).splitlines()
    return Answers([_answer(line, sorted(signature.outputs)) for line, signature in zip(lines, asked, strict=True)], {})


def read_meta_graph(path):
    """The tensorflow.MetaGraphDef of a SavedModel."""
    (meta_graph,) = saved_model_pb2.SavedModel.FromString(Path(path, "saved_model.pb").read_bytes()).meta_graphs
    return meta_graph


def read_signatures(path):
    """The signatures of a SavedModel, name -> tensorflow.SignatureDef, without what the loader adds for itself."""
    signatures = dict(read_meta_graph(path).signature_def)
    del signatures["__saved_model_init_op"]
    return signatures


_TYPES = {np.dtype(kind.as_numpy_dtype): kind for kind in (tf.float32, tf.int32, tf.int64, tf.uint8)}


def _in_words(request, signature):
    """A request as load_saved_model.c reads it."""
    outputs = sorted(signature.outputs)
    words = [len(request.inputs), len(outputs)]
    for name, value in request.inputs.items():
        strings = value.dtype.kind == "S"
        kind = tf.string if strings else _TYPES[value.dtype]
        words += [signature.inputs[name].name, kind.as_datatype_enum, value.ndim, *value.shape]
        words += [f"x{each.hex()}" for each in value.ravel()] if strings else value.ravel().tolist()
    words += [signature.outputs[name].name for name in outputs]
    return " ".join(map(str, words))


def _answer(line, names):
    verdict, *words = line.split()
    if verdict == "error":
        code, message = line.split(" ", 2)[1:]
        return Refusal(tf.compat.v1.errors.exception_type_from_error_code(int(code)).__name__, message)
    words = iter(words)
    answer = {}
    for name in names:
        kind, rank = tf.as_dtype(int(next(words))), int(next(words))
        shape = [int(next(words)) for _ in range(rank)]
        values = [next(words) for _ in range(int(np.prod(shape)))]
        if kind == tf.string:
            values = np.array([bytes.fromhex(value[1:]) for value in values])
        answer[name] = np.array(values, None if kind == tf.string else kind.as_numpy_dtype).reshape(shape)
    assert next(words, None) is None
    return answer


def _run(command, folder, stdin=""):
    environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"}
    result = subprocess.run(
        command, cwd=folder, env=environment, input=stdin, capture_output=True, text=True, timeout=600
    )
    assert result.returncode == 0, f"{command} ended with {result.returncode}\n{result.stdout}\n{result.stderr}"
    return result.stdout

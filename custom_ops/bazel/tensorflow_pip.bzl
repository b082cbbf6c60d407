"""A repository with the TensorFlow, pybind11 and Python headers of an installed Python, linked and not copied.

The Python is the one that the environment variable PYTHON_BIN_PATH names, or else python3. The repository has

    :tensorflow          headers of TensorFlow, with the definitions they have to be compiled with
    :libraries           libtensorflow_framework and libtensorflow_cc
    :pybind11            headers of pybind11 and of Python
    :python_toolchain    what makes py_test and py_binary run that Python
    :tensorflow.txt      which TensorFlow it is, for what has to be made anew for another one
    environment.bzl      PYTHON, SITE_PACKAGES and EXTENSION_SUFFIX
"""

_PROBE = """
import json
import site
import sys
import sysconfig

import pybind11
import tensorflow as tf

print(json.dumps({
    "compile_flags": tf.sysconfig.get_compile_flags(),
    "extension_suffix": sysconfig.get_config_var("EXT_SUFFIX"),
    "pybind11_include": pybind11.get_include(),
    "python": sys.executable,
    "python_include": sysconfig.get_path("include"),
    "site_packages": site.getsitepackages(),
    "tensorflow_include": tf.sysconfig.get_include(),
    "tensorflow_libraries": tf.sysconfig.get_lib(),
    "tensorflow_version": "%s %s" % (tf.version.VERSION, tf.version.GIT_VERSION),
}))
"""

_BUILD = """\
load("@rules_cc//cc:defs.bzl", "cc_library")
load("@rules_python//python:defs.bzl", "py_runtime", "py_runtime_pair")

package(default_visibility = ["//visibility:public"])

cc_library(
    name = "tensorflow",
    hdrs = glob(["tensorflow_include/**"]),
    defines = {defines},
    includes = [
        "tensorflow_include",
        # TensorFlow's headers include these two without a folder.
        "tensorflow_include/external/farmhash_archive/src",
        "tensorflow_include/external/highwayhash",
    ],
)

cc_library(
    name = "libraries",
    srcs = {libraries},
)

exports_files({libraries} + ["tensorflow.txt"])

cc_library(
    name = "pybind11",
    hdrs = glob([
        "pybind11_include/**",
        "python_include/**",
    ]),
    includes = [
        "pybind11_include",
        "python_include",
    ],
)

py_runtime(
    name = "python_runtime",
    interpreter_path = "{python}",
    python_version = "PY3",
    stub_shebang = "#!/usr/bin/env python3",
)

py_runtime_pair(
    name = "python_runtime_pair",
    py3_runtime = ":python_runtime",
)

toolchain(
    name = "python_toolchain",
    toolchain = ":python_runtime_pair",
    toolchain_type = "@bazel_tools//tools/python:toolchain_type",
)
"""

_ENVIRONMENT = """\
PYTHON = {python}
SITE_PACKAGES = {site_packages}
EXTENSION_SUFFIX = {extension_suffix}
"""

_LIBRARIES = ["libtensorflow_framework.so.2", "libtensorflow_cc.so.2"]

def _interpreter(repository_ctx):
    name = repository_ctx.os.environ.get("PYTHON_BIN_PATH") or "python3"
    path = repository_ctx.path(name) if name.startswith("/") else None if "/" in name else repository_ctx.which(name)
    if path == None or not path.exists:
        fail("PYTHON_BIN_PATH must be the absolute path of a Python, or its name on PATH. Received: %s" % name)
    return path

def _tensorflow_pip_impl(repository_ctx):
    interpreter = _interpreter(repository_ctx)
    result = repository_ctx.execute([interpreter, "-c", _PROBE], environment = {"TF_CPP_MIN_LOG_LEVEL": "2"})
    if result.return_code != 0:
        fail(("%s has no working TensorFlow and pybind11. Install both there (pip install tensorflow pybind11), " +
              "or name another Python by its absolute path: --repo_env=PYTHON_BIN_PATH=.../bin/python\n%s") %
             (interpreter, result.stderr))
    found = json.decode(result.stdout.strip().split("\n")[-1])

    for folder in ("tensorflow_include", "pybind11_include", "python_include"):
        repository_ctx.symlink(found[folder], folder)
    for library in _LIBRARIES:
        repository_ctx.symlink(found["tensorflow_libraries"] + "/" + library, library)
    repository_ctx.file("WORKSPACE", 'workspace(name = "%s")\n' % repository_ctx.name)
    repository_ctx.file("tensorflow.txt", found["tensorflow_version"] + "\n")
    repository_ctx.file("BUILD", _BUILD.format(
        defines = [flag[2:] for flag in found["compile_flags"] if flag.startswith("-D")],
        libraries = _LIBRARIES,
        python = found["python"],
    ))
    repository_ctx.file("environment.bzl", _ENVIRONMENT.format(
        extension_suffix = repr(found["extension_suffix"]),
        python = repr(found["python"]),
        site_packages = repr(found["site_packages"]),
    ))

tensorflow_pip = repository_rule(
    implementation = _tensorflow_pip_impl,
    configure = True,
    doc = "See the top of this file.",
    environ = ["PYTHON_BIN_PATH"],
    local = True,  # another TensorFlow may be installed while Bazel does not look
)

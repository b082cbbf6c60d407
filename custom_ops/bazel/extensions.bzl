"""The repository rule of tensorflow_pip.bzl for MODULE.bazel. It stands alone, for Bazel 4 knows no extensions."""

load(":tensorflow_pip.bzl", "tensorflow_pip")

def _tensorflow_pip_extension_impl(_module_ctx):
    tensorflow_pip(name = "tensorflow_pip")

tensorflow_pip_extension = module_extension(implementation = _tensorflow_pip_extension_impl)

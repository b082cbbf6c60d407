"""Tests written for pytest, as Bazel tests."""

load("@rules_python//python:defs.bzl", "py_test")
load("@tensorflow_pip//:environment.bzl", "SITE_PACKAGES")

def pytest_test(name, srcs, **kwargs):
    """A py_test that runs pytest on those of `srcs` whose names start with test_, with the compiled op.

    Args:
        name: name of the target.
        srcs: the files of the tests, and what they import from beside them.
        **kwargs: further arguments of py_test.
    """
    runner = "//custom_ops/bazel:run_pytest.py"
    py_test(
        name = name,
        srcs = srcs + [runner],
        main = runner,
        args = ["$(rootpath %s)" % src for src in srcs if src.rpartition("/")[2].startswith("test_")],
        env = {
            "CUDA_VISIBLE_DEVICES": "",  # Bazel builds for the CPU only
            "SITE_PACKAGES": ":".join(SITE_PACKAGES),
        },
        legacy_create_init = 0,  # an aib_tf/__init__.py of Bazel's own would hide the package of that name
        **kwargs
    )

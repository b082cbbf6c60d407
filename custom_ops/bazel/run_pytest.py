"""Runs pytest on the files that are its arguments, and sees to it that they tested the compiled op."""

import importlib.util
import os
import site
import sys

# A test sees nothing of the person who runs it, such as the backend in ~/.keras, and leaves nothing there.
os.environ["HOME"] = os.environ["HYPOTHESIS_STORAGE_DIRECTORY"] = os.environ["TEST_TMPDIR"]

# Some launchers give Python an environment of its own, which hides what is installed.
if importlib.util.find_spec("tensorflow") is None:
    for folder in os.environ["SITE_PACKAGES"].split(os.pathsep):
        site.addsitedir(folder)

import pytest


def main():
    options = ["-p", "no:cacheprovider", f"--junit-xml={os.environ['XML_OUTPUT_FILE']}"]
    status = pytest.main([*options, *sys.argv[1:]])

    # Imported this late, because tests/conftest.py has to come before TensorFlow starts.
    from aib_tf import ops

    used = ops.implementation()
    print(f"aib_tf.ops used {used.name}. {used.reason}")
    if used.name != "custom_op":
        print("The tests are meant for the compiled op, so this counts as a failure.", file=sys.stderr)
        status = status or 1
    return status


if __name__ == "__main__":
    sys.exit(main())

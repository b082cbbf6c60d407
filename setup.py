"""Builds the package. What can be declared is in pyproject.toml, what has to be computed here."""

import pathlib
import sys

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = pathlib.Path(__file__).resolve().parent
OPS = pathlib.PurePath("aib_tf", "ops")


class BuildCustomOps(build_ext):
    """Compiles custom_ops/ into the package: into the wheel, or beside the sources for an editable install."""

    files = ()

    def run(self):
        sys.path.insert(0, str(ROOT / "custom_ops"))
        import compile as custom_ops

        output = (ROOT if self.inplace else pathlib.Path(self.build_lib)) / OPS
        try:
            record = custom_ops.build(output)
        except (custom_ops.CompilerError, custom_ops.UnavailableError, ValueError) as error:
            raise CompileError(str(error)) from error
        made = (record["library"], record["numpy_module"])
        self.files = [custom_ops.RECORD, *(each["file"] for each in made if each)]

    def get_outputs(self):
        return [str(self.build_lib / OPS / file) for file in self.files]

    def get_output_mapping(self):
        in_place = [str(OPS / file) for file in self.files] if self.inplace else []
        return dict(zip(self.get_outputs(), in_place, strict=False))


setup(
    cmdclass={"build_ext": BuildCustomOps},
    # Its presence makes the wheel one for this platform and this version of Python.
    ext_modules=[Extension("aib_tf.ops.nearest_anchor_numpy", sources=[])],
    # setuptools builds in build/, which is the file BUILD where file names ignore case.
    options={"build": {"build_base": ".build"}},
)

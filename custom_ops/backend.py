"""The build backend: the one of setuptools, which also asks for TensorFlow where the environment has none.

The op is compiled for one release of TensorFlow. Were TensorFlow a build requirement like the others, pip would fetch
it anew for each build, and maybe another release than the one that is installed.
"""

import compile as custom_ops
from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403


def get_requires_for_build_wheel(config_settings=None):
    return build_meta.get_requires_for_build_wheel(config_settings) + custom_ops.required_tensorflow()


def get_requires_for_build_editable(config_settings=None):
    return build_meta.get_requires_for_build_editable(config_settings) + custom_ops.required_tensorflow()

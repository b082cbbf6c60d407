"""Builds the package. What can be declared is in pyproject.toml, what has to be computed here."""

from setuptools import setup

# setuptools builds in build/, which is the file BUILD where file names ignore case.
setup(options={"build": {"build_base": ".build"}})

"""The project's metadata lives in pyproject.toml; this file is where extensions are added to the build."""

from setuptools import setup

setup()

"""Builds csrc into engine._C; everything else about the package is in pyproject.toml."""

from glob import glob

from pybind11.setup_helpers import Pybind11Extension
from setuptools import setup

setup(
    ext_modules=[
        Pybind11Extension("engine._C", sorted(glob("csrc/*.cpp")), depends=glob("csrc/*.h"), cxx_std=17, extra_compile_args=["-O3"]),
    ],
)

"""Builds csrc into engine._C. Everything else about the package is in pyproject.toml. `make sanitize` sets SANITIZE."""

import os
from glob import glob

from pybind11.setup_helpers import Pybind11Extension
from setuptools import setup

sanitize = ["-O1", "-g", "-fno-omit-frame-pointer", "-fno-sanitize-recover=all", "-fsanitize=address,undefined"]
optimize = {"extra_compile_args": ["-O3"]}
sanitized = {"extra_compile_args": sanitize, "extra_link_args": sanitize[-1:]}
flags = sanitized if os.environ.get("SANITIZE") else optimize

setup(
    ext_modules=[Pybind11Extension("engine._C", sorted(glob("csrc/*.cpp")), depends=glob("csrc/*.h"), cxx_std=17, **flags)],
)

"""Builds the native ops where there is a C++ compiler; without one the portable graphs serve, and one line says so.

Everything else about the package stands in pyproject.toml.
"""

import sys
from pathlib import Path
from typing import Any

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

SOURCES = "runtime/native/src"
FLAGS = ["-O3", "-std=c++17", "-ffp-contract=off", "-fvisibility=hidden", "-Wall", "-Wextra"]
GCC_HEADER_NOISE = ["-Wno-uninitialized", "-Wno-maybe-uninitialized"]  # of GCC 12's own AVX-512 headers


class BuildNativeOps(build_ext):
    """Builds a plain shared library, no Python module; a failure is one line and no error."""

    def build_extension(self, extension: Extension) -> None:
        """Compiles and links, or says why not."""
        try:
            super().build_extension(extension)
        except Exception as error:
            reason = " ".join(str(error).split())[:200]
            print(f"gemma-edge: no native ops, artifacts run slower: install GCC or Clang and try again ({reason})")

    def get_export_symbols(self, extension: Extension) -> list[str]:
        """No PyInit function: ONNX Runtime loads the library, not Python."""
        return []

    def get_ext_filename(self, fullname: str) -> str:
        """The same name for every Python version."""
        return str(Path(*fullname.split("."))) + {"win32": ".dll", "darwin": ".dylib"}.get(sys.platform, ".so")


class WheelForAnyPython(bdist_wheel):
    """A wheel for one platform, but for every Python 3: the library knows nothing of Python."""

    def get_tag(self) -> tuple[str, str, str]:
        """Python, ABI and platform that the wheel is for."""
        return "py3", "none", super().get_tag()[2]


def extension() -> Extension:
    """The library with all instruction sets in one; files for other architectures compile to nothing."""
    self_contained = ["-static-libstdc++", "-static-libgcc", "-s"] if sys.platform != "darwin" else []
    options: dict[str, Any] = {"extra_compile_args": FLAGS + GCC_HEADER_NOISE, "extra_link_args": self_contained}
    sources = sorted(str(path) for path in Path(SOURCES).glob("*.cpp"))
    headers = sorted(str(path) for path in Path(SOURCES).glob("*.hpp"))
    return Extension("runtime.native.edge_ops", sources, depends=headers, language="c++", optional=True, **options)


setup(ext_modules=[extension()], cmdclass={"bdist_wheel": WheelForAnyPython, "build_ext": BuildNativeOps})

"""Packaging: metadata lives in pyproject.toml, compilation in CMakeLists.txt; this only joins the two."""

import os
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        import pybind11

        # A fixed folder per interpreter, so that a re-install compiles only what changed.
        build = ROOT / "build" / sys.implementation.cache_tag
        # pip puts cmake and ninja beside the interpreter, which need not be on PATH.
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
        env = {**os.environ, "PATH": path}
        options = {
            "CMAKE_BUILD_TYPE": "Release",
            "CMAKE_LIBRARY_OUTPUT_DIRECTORY": Path(self.get_ext_fullpath(ext.name)).parent.resolve(),
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": pybind11.get_cmake_dir(),
            "ZSQ_CUDA": os.environ.get("ZSQ_CUDA", "AUTO"),
            "ZSQ_CUDA_ARCHS": os.environ.get("ZSQ_CUDA_ARCHS", ""),
        }
        defines = [f"-D{name}={value}" for name, value in options.items()]
        subprocess.run(["cmake", "-S", ROOT, "-B", build, "-G", "Ninja", *defines], check=True, env=env)
        subprocess.run(["cmake", "--build", build], check=True, env=env)


setup(
    packages=[*find_packages(include=["zsq_ext", "zsq_ext.*"]), "zsq_ext.kernels"],
    package_dir={"zsq_ext.kernels": "kernels"},
    package_data={"zsq_ext": ["py.typed", "**/*.safetensors", "**/*.json"]},
    include_package_data=False,
    ext_modules=[Extension("zsq_ext._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)

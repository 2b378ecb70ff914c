"""The package as it is installed: its files, its version, and a C project that builds against it."""

import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import flatmtl
import pytest

ROOT = Path(__file__).resolve().parents[2]
HEADER = ROOT / "csrc" / "include" / "flatmtl.h"
CONSUMER = ROOT / "tests" / "consumer"


def header_version() -> str:
    text = HEADER.read_text()
    return ".".join(re.search(rf"VERSION_{part} (\d+)", text)[1] for part in ("MAJOR", "MINOR", "PATCH"))


def run(*command: object, **environment: str) -> str:
    """The output of a command that must succeed."""
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, env=os.environ | environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_version_is_the_headers():
    assert flatmtl.__version__ == header_version()
    assert importlib.metadata.version("flatmtl") == header_version()


def test_requires_torch_alone():
    required = importlib.metadata.requires("flatmtl")
    assert [line for line in required if "extra ==" not in line] == ["torch>=2.10"]


@pytest.mark.skipif("FLATMTL_TEST_INSTALLED" not in os.environ, reason="the source tree may be what is tested")
def test_the_installed_package_is_what_is_tested():
    assert not Path(flatmtl.__file__).is_relative_to(ROOT / "python")
    for module in list(sys.modules.values()):
        if getattr(module, "__name__", "").startswith("flatmtl"):
            assert not Path(module.__file__).is_relative_to(ROOT / "python")


def test_installed_header_is_the_one_in_the_tree():
    assert (Path(flatmtl.cmake_prefix_path) / "include" / "flatmtl.h").read_bytes() == HEADER.read_bytes()


@pytest.mark.skipif(shutil.which("cmake") is None, reason="no cmake")
def test_cmake_project_finds_the_package(tmp_path):
    run("cmake", "-S", CONSUMER, "-B", tmp_path, f"-DCMAKE_PREFIX_PATH={flatmtl.cmake_prefix_path}")
    run("cmake", "--build", tmp_path)
    output = run("ctest", "--test-dir", tmp_path, "--output-on-failure")
    assert re.search(r"100% tests passed.* out of 4$", output, re.M)


@pytest.mark.skipif(shutil.which("cc") is None, reason="no cc")
def test_pkg_config_finds_the_package(tmp_path):
    library = Path(flatmtl.cmake_prefix_path) / "lib"

    def pkg_config(*arguments):
        if shutil.which("pkg-config"):
            return run("pkg-config", *arguments, "flatmtl", PKG_CONFIG_PATH=str(library / "pkgconfig")).split()
        return run(
            sys.executable, "-m", "pkgconf", *arguments, "flatmtl", PKG_CONFIG_PATH=str(library / "pkgconfig")
        ).split()

    if shutil.which("pkg-config") is None and importlib.util.find_spec("pkgconf") is None:
        pytest.skip("no pkg-config")
    program = tmp_path / "main"
    run("cc", CONSUMER / "main.c", "-o", program, *pkg_config("--cflags", "--libs"), "-lm")
    assert "weights 0.75 0.25" in run(program, *pkg_config("--modversion"), LD_LIBRARY_PATH=str(library))

"""Runs the project's checks one after another, against the package installed in this Python, and sums up.

    python tests/run.py [--long] [NAME ...]      no names: all of them

Every check runs even if an earlier one failed. Exit status 1 if any failed.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build"
PYTHON_FILES = ["python", "tests", "examples", "cmake"]
C_DIRECTORIES = ["csrc", "shim", "tests", "examples"]
JOBS = str(os.cpu_count() or 1)
ASAN = "detect_stack_use_after_return=1:strict_string_checks=1"
UBSAN = "print_stacktrace=1"
# torch, which is not built for it, is left out with the C library that it calls.
TSAN = "halt_on_error=1:ignore_noninstrumented_modules=1"


def run(*command: str | Path, **environment: str) -> None:
    """Runs a command from the root of the project; raises CalledProcessError if it fails."""
    print("$", *(f"{key}={value}" for key, value in environment.items()), *command, flush=True)
    # The source tree must not be importable: the installed package is what is tested.
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | environment
    subprocess.run([str(part) for part in command], cwd=ROOT, env=env, stdin=subprocess.DEVNULL, check=True)


def python(*arguments: str | Path, **environment: str) -> None:
    run(sys.executable, *arguments, **environment)


def cmake_build(directory: str, *options: str, target: str = "all") -> Path:
    build = BUILD / directory
    run("cmake", "-S", ".", "-B", build, "-DFLATMTL_BUILD_TESTS=ON", "-DFLATMTL_WERROR=ON", *options)
    run("cmake", "--build", build, "--target", target, "--parallel", JOBS)
    return build


def ctest(build: Path, **environment: str) -> None:
    run("ctest", "--test-dir", build, "--output-on-failure", "--no-tests=error", "--parallel", JOBS, **environment)


def lint() -> None:
    sources = [path for path in PYTHON_FILES if (ROOT / path).is_dir()]
    python("-m", "ruff", "check", *sources)
    python("-m", "ruff", "format", "--check", *sources)
    python("-m", "mypy")
    files = [
        path for name in C_DIRECTORIES for path in sorted((ROOT / name).rglob("*.[ch]*")) if path.suffix in SUFFIXES
    ]
    run(
        Path(sys.executable).parent / "clang-format",
        "--dry-run",
        "-Werror",
        *(path.relative_to(ROOT) for path in files),
    )


SUFFIXES = {".c", ".h", ".cpp", ".hpp"}


def c_tests() -> None:
    ctest(cmake_build("c"))


def c_sanitizers() -> None:
    build = cmake_build(
        "sanitize",
        "-DFLATMTL_SANITIZE=address,undefined",
        "-DCMAKE_BUILD_TYPE=Debug",
        "-DCMAKE_C_FLAGS_DEBUG=-g -O1",
        target="flatmtl_tests",
    )
    ctest(build, ASAN_OPTIONS=ASAN, UBSAN_OPTIONS=UBSAN)


def c_threads() -> None:
    build = cmake_build("threads", "-DFLATMTL_SANITIZE=thread", target="flatmtl_tests")
    ctest(build, TSAN_OPTIONS=TSAN)


def c_valgrind() -> None:
    if not shutil.which("valgrind"):
        print("no valgrind here: left out")
        return
    build = cmake_build("valgrind", "-DCMAKE_BUILD_TYPE=RelWithDebInfo", target="flatmtl_tests")
    run(
        "valgrind",
        "--quiet",
        "--error-exitcode=1",
        "--leak-check=full",
        build / "tests/c/flatmtl_tests",
        "--durations=yes",
        # Left out: its oracle needs more than the 64 bits that valgrind gives a long double.
        "~MGDA and CAGrad meet their optimality conditions on hard Gramians",
        FLATMTL_ISA="base",
    )


def python_address() -> None:
    python("tests/python_sanitizers.py", "address")


def python_sanitizers() -> None:
    python("tests/python_sanitizers.py", "address", "tests", "leaks", "threads")


def torch_prefix() -> str:
    code = "import torch; print(torch.utils.cmake_prefix_path)"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def cpp_build(directory: str, prefix: str, *options: str) -> Path:
    """The tests of the C++ optimizer, against a flatmtl installed in prefix and this Python's torch."""
    build = BUILD / directory
    prefixes = f"-DCMAKE_PREFIX_PATH={prefix};{torch_prefix()}"
    run("cmake", "-S", "tests/cpp", "-B", build, prefixes, *options)
    run("cmake", "--build", build)
    return build


def cpp_tests() -> None:
    code = "import flatmtl; print(flatmtl.cmake_prefix_path)"
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    ctest(cpp_build("cpp", found.stdout.strip()))
    # A user's program against `cmake --install`; the wheel was it above.
    library = cmake_build("library", "-DFLATMTL_BUILD_TESTS=OFF")
    compilers = [f"-DCC={os.environ.get('CC', 'cc')}", f"-DCXX={os.environ.get('CXX', 'c++')}"]
    generator = f"-DGENERATOR={os.environ['CMAKE_GENERATOR']}"
    run(
        "cmake",
        f"-DBUILD={library}",
        generator,
        *compilers,
        f"-DTORCH={torch_prefix()}",
        "-P",
        "tests/consumer/run.cmake",
    )


def sanitized_library(kind: str, sanitizers: str) -> Path:
    """The prefix of the C library under sanitizers, with the headers of the C++ optimizer."""
    options = ["-DCMAKE_BUILD_TYPE=RelWithDebInfo", f"-DFLATMTL_SANITIZE={sanitizers}"]
    library = cmake_build(f"{kind}-library", "-DFLATMTL_BUILD_TESTS=OFF", *options)
    prefix = BUILD / f"{kind}-installed"
    run("cmake", "--install", library, "--prefix", prefix)
    return prefix


def cpp_sanitized(kind: str, sanitizers: str) -> Path:
    """The tests of the C++ optimizer and the C library under sanitizers; torch itself is as it is."""
    prefix = sanitized_library(kind, sanitizers)
    return cpp_build(f"{kind}-cpp", str(prefix), f"-DFLATMTL_SANITIZE={sanitizers}") / "flatmtl_cpp_tests"


def cpp_sanitizers() -> None:
    run(cpp_sanitized("sanitize", "address,undefined"), ASAN_OPTIONS=ASAN, UBSAN_OPTIONS=UBSAN)


def cpp_threads() -> None:
    run(cpp_sanitized("threads", "thread"), TSAN_OPTIONS=TSAN, OMP_NUM_THREADS="4")


def example_build(name: str, kind: str, sanitizers: str, *prefixes: str) -> Path:
    """A program of examples/ and the C library under sanitizers."""
    build = BUILD / f"{kind}-{name}"
    flags = f"-fsanitize={sanitizers} -fno-sanitize-recover=all -fno-omit-frame-pointer -g"
    options = [
        f"-DCMAKE_{language}_FLAGS{suffix}" for language in ("C", "CXX") for suffix in (f"={flags}", "_RELEASE=-O1")
    ]
    prefix = ";".join([str(sanitized_library(kind, sanitizers)), *prefixes])
    run("cmake", "-S", f"examples/{name}", "-B", build, f"-DCMAKE_PREFIX_PATH={prefix}", *options)
    run("cmake", "--build", build)
    return build


def deploy_sanitized(kind: str, sanitizers: str, threads: int, **environment: str) -> None:
    """examples/deploy: trained in Python, fine-tuned by a program under sanitizers; with one thread compared in Python."""
    build = example_build("deploy", kind, sanitizers, torch_prefix())
    folder = build / "model"
    python("examples/deploy/train.py", folder, "1")
    run(build / "finetune", folder, str(threads), OMP_NUM_THREADS=str(threads), **environment)
    if threads == 1:  # torch's own sums depend on their number
        python("examples/deploy/check.py", folder)


def example_sanitizers() -> None:
    sanitizers = "address,undefined"
    deploy_sanitized("sanitize", sanitizers, 1, ASAN_OPTIONS=ASAN, UBSAN_OPTIONS=UBSAN)
    build = example_build("plain_c", "sanitize", sanitizers)
    python("examples/plain_c/export_digits.py", build / "digits.csv")
    run(build / "digits", build / "digits.csv", "0.1", ASAN_OPTIONS=ASAN, UBSAN_OPTIONS=UBSAN)


def example_threads() -> None:
    deploy_sanitized("threads", "thread", 4, TSAN_OPTIONS=TSAN)


def c_fuzz() -> None:
    """A minute of libFuzzer on bytes -> Gramian -> every method, from the saved inputs."""
    clang = next((path for name in ("clang", "clang-14") if (path := shutil.which(name))), None)
    if not clang:
        print("no clang here: left out")
        return
    build = cmake_build(
        "fuzz",
        f"-DCMAKE_C_COMPILER={clang}",
        "-DFLATMTL_BUILD_FUZZERS=ON",
        "-DFLATMTL_SANITIZE=fuzzer-no-link,address,undefined",
        "-DCMAKE_BUILD_TYPE=Debug",
        "-DCMAKE_C_FLAGS_DEBUG=-g -O1",
        target="flatmtl_fuzz_weights",
    )
    found = build / "corpus"
    found.mkdir(exist_ok=True)
    run(
        build / "tests/fuzz/flatmtl_fuzz_weights",
        "-max_total_time=60",
        "-max_len=512",
        f"-artifact_prefix={found}/",
        found,
        "tests/fuzz/corpus",
    )


def wheel() -> None:
    wheels = list((BUILD / "dist").glob("*.whl"))
    if len(wheels) != 1:
        raise RuntimeError(f"one wheel expected in {BUILD / 'dist'}, found {len(wheels)}")
    python("tests/check_wheel.py", wheels[0])


def pytest() -> None:
    python("-m", "pytest", "-m", "not slow", FLATMTL_TEST_INSTALLED="1")


def pytest_long() -> None:
    python("-m", "pytest", FLATMTL_TEST_INSTALLED="1", HYPOTHESIS_PROFILE="long")


SHORT = [lint, c_tests, c_sanitizers, python_address, wheel, cpp_tests, pytest]
LONG = [
    lint, c_tests, c_sanitizers, c_threads, c_valgrind, c_fuzz, python_sanitizers, wheel, cpp_tests, cpp_sanitizers,
    cpp_threads, example_sanitizers, example_threads, pytest_long,
]  # fmt: skip


def ensure_build_tools() -> None:
    """cmake >= 3.22 and a generator; from the package index, into this environment, where they are absent."""
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    cmake = shutil.which("cmake")
    text = subprocess.run([cmake, "--version"], capture_output=True, text=True, check=True).stdout if cmake else ""
    version = re.search(r"(\d+)\.(\d+)", text)
    if not version or (int(version[1]), int(version[2])) < (3, 22):
        python("-m", "pip", "install", "--quiet", "cmake")
    if shutil.which("ninja") is None:
        python("-m", "pip", "install", "--quiet", "ninja")
    os.environ.setdefault("CMAKE_GENERATOR", "Ninja")


def main() -> int:
    checks: dict[str, Callable[[], None]] = {check.__name__: check for check in SHORT + LONG}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", choices=[[], *checks], help=", ".join(checks))
    parser.add_argument("--long", action="store_true", help="slow checks too")
    arguments = parser.parse_args()
    chosen = [checks[name] for name in arguments.names] or (LONG if arguments.long else SHORT)

    ensure_build_tools()
    failed, lines = [], []
    for check in chosen:
        print(f"\n=== {check.__name__} ===", flush=True)
        start = time.monotonic()
        try:
            check()
            result = "ok"
        except (subprocess.CalledProcessError, OSError, RuntimeError) as error:
            print(f"{check.__name__}: {error}", file=sys.stderr, flush=True)
            result = "FAILED"
            failed.append(check.__name__)
        lines.append(f"{check.__name__:<18} {result:<6} {time.monotonic() - start:6.0f} s")
    print("\n" + "\n".join(lines))
    print(f"checks: {len(chosen) - len(failed)} passed, {len(failed)} failed", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

"""Runs Python with the ops built for sanitizers; torch and Python themselves are as they are.

    python tests/python_sanitizers.py address|tests|leaks|threads ...

address: tests/exercise.py under AddressSanitizer and UndefinedBehaviorSanitizer. tests: the same for Python tests of the
ops and of the optimizer. leaks: LeakSanitizer; Python and torch keep memory to the end, so that only what was allocated
through the ops counts. threads: ThreadSanitizer, four threads.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build"
EXERCISE = [sys.executable, "-W", "ignore", ROOT / "tests" / "exercise.py"]
TESTS = ["test_ops.py", "test_functional.py", "test_optimizer_step.py"]


def build(name: str, sanitizers: str) -> Path:
    """The shared object of the ops, built for sanitizers."""
    directory = BUILD / f"{name}-ops"
    options = [
        f"-DFLATMTL_SANITIZE={sanitizers}", "-DFLATMTL_BUILD_TORCH=ON", "-DFLATMTL_BUILD_SHARED=OFF",
        "-DFLATMTL_BUILD_STATIC=OFF", "-DCMAKE_BUILD_TYPE=RelWithDebInfo", f"-DPython_EXECUTABLE={sys.executable}",
    ]  # fmt: skip
    subprocess.run(["cmake", "-S", ROOT, "-B", directory, *options], check=True, stdout=subprocess.DEVNULL)
    jobs = str(os.cpu_count() or 1)
    subprocess.run(["cmake", "--build", directory, "--target", "flatmtl_torch", "--parallel", jobs], check=True)
    return directory / "shim" / "_C.so"


def preload(*names: str) -> str:
    """Paths of the compiler's libraries: sanitizers have to be loaded before everything else."""
    compiler = os.environ.get("CC", "cc")
    found = [
        subprocess.run([compiler, f"-print-file-name={name}"], stdout=subprocess.PIPE, text=True, check=True).stdout
        for name in names
    ]
    return " ".join(path.strip() for path in found)


def run(command: list[str | Path], library: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    print("$", *command, flush=True)
    env = os.environ | {"FLATMTL_LIBRARY": str(library), "OMP_NUM_THREADS": "2"} | environment
    done = subprocess.run(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT)
    return done


def must(done: subprocess.CompletedProcess[str], said: str) -> None:
    if done.returncode != 0 or said not in done.stdout:
        sys.exit(f"{done.stdout[-20000:]}\nexit status {done.returncode}")
    print(done.stdout[-500:], flush=True)


# libstdc++: AddressSanitizer looks for its __cxa_throw when Python starts, which does not load it.
ADDRESS = ("libasan.so", "libstdc++.so")
STRICT = "detect_stack_use_after_return=1:strict_string_checks=1"


def address() -> None:
    library = build("address", "address,undefined")
    options = {"LD_PRELOAD": preload(*ADDRESS), "ASAN_OPTIONS": f"detect_leaks=0:{STRICT}"}
    must(run(EXERCISE, library, **options, UBSAN_OPTIONS="print_stacktrace=1"), "exercised")


def tests() -> None:
    library = build("address", "address,undefined")
    options = {"LD_PRELOAD": preload(*ADDRESS), "ASAN_OPTIONS": f"detect_leaks=0:{STRICT}"}
    # Left out: what starts other programs, and the measurement of memory.
    command = [
        sys.executable, "-m", "pytest", "-q", "--timeout=1800", "-k", "not compile and not memory and not threads",
        *(ROOT / "tests" / "python" / name for name in TESTS),
    ]  # fmt: skip
    must(run(command, library, **options, UBSAN_OPTIONS="print_stacktrace=1"), " passed")


def leaks() -> None:
    library = build("address", "address,undefined")
    options = "detect_leaks=1:malloc_context_size=30"
    environment = {"LD_PRELOAD": preload(*ADDRESS), "PYTHONMALLOC": "malloc", "ASAN_OPTIONS": options}
    done = run([*EXERCISE, "--rounds", "1"], library, **environment, LSAN_OPTIONS="exitcode=0")
    if done.returncode != 0 or "exercised" not in done.stdout:
        sys.exit(f"{done.stdout[-20000:]}\nexit status {done.returncode}")
    reports = re.split(r"\n(?=(?:Direct|Indirect) leak of )", done.stdout)
    ours = [report for report in reports[1:] if re.search(r"/shim/|/csrc/src/|_C\.so", report)]
    print(f"{len(reports) - 1} reports, {len(ours)} of them with flatmtl in the stack", flush=True)
    if ours:
        sys.exit("\n".join(ours[:5]))


def threads() -> None:
    library = build("threads", "thread")
    environment = {"LD_PRELOAD": preload("libtsan.so"), "TSAN_OPTIONS": "halt_on_error=1", "OMP_NUM_THREADS": "4"}
    must(run([*EXERCISE, "--threads", "4"], library, **environment), "exercised")


if __name__ == "__main__":
    for name in sys.argv[1:]:
        {"address": address, "tests": tests, "leaks": leaks, "threads": threads}[name]()

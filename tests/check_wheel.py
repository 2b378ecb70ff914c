"""Checks a built wheel: its tag, what its shared objects need, and that they hold no CPython symbol.

    python tests/check_wheel.py dist/flatmtl-*.whl

A wheel is self-contained if its shared objects need only torch's own libraries, which the process has loaded when
flatmtl is imported, and the libraries that every manylinux policy lets a wheel take from the system.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

TORCH = {"libtorch_cpu.so", "libtorch.so", "libc10.so"}
MANYLINUX = {"libc.so.6", "libm.so.6", "libgcc_s.so.1", "libstdc++.so.6", "libpthread.so.0", "libdl.so.2", "librt.so.1"}
LOADER = re.compile(r"ld-linux.*\.so\.\d+")
EXPECTED = (
    "_C.so",
    "py.typed",
    "include/flatmtl.h",
    "include/flatmtl/torch.h",
    "lib/libflatmtl.a",
    "lib/cmake/flatmtl/flatmtlConfig.cmake",
)


def readelf(*arguments: str | Path) -> str:
    return subprocess.run(["readelf", "--wide", *arguments], capture_output=True, text=True, check=True).stdout


def shared_object_faults(path: Path) -> list[str]:
    """What keeps a shared object from running on another machine with torch."""
    dynamic = readelf("--dynamic", path)
    needed = set(re.findall(r"\(NEEDED\).*\[(.*)\]", dynamic))
    foreign = {name for name in needed - TORCH - MANYLINUX if not LOADER.fullmatch(name)}
    faults = [f"needs {name}" for name in sorted(foreign)]
    faults += [f"has the search path {found}" for found in re.findall(r"\((?:RPATH|RUNPATH)\).*\[(.*)\]", dynamic)]
    undefined = re.findall(r" UND (\S+)", readelf("--dyn-syms", path))
    faults += [f"uses CPython's {name}" for name in undefined if re.match(r"_?Py[A-Z_]", name)]
    return faults


def newest_versions(path: Path) -> dict[str, str]:
    """The newest symbol version needed of each system library, such as {"GLIBC": "2.34"}."""
    newest: dict[str, tuple[int, ...]] = {}
    for name, version in re.findall(r"\b(GLIBC|GLIBCXX|CXXABI)_(\d+(?:\.\d+)+)\b", readelf("--version-info", path)):
        newest[name] = max(newest.get(name, (0,)), tuple(int(part) for part in version.split(".")))
    return {name: ".".join(map(str, version)) for name, version in sorted(newest.items())}


def main(wheel: Path) -> int:
    faults = []
    if not re.fullmatch(r"flatmtl-[\d.]+-py3-none-[a-z0-9_]+\.whl", wheel.name):
        faults.append(f"{wheel.name}: the tag is not py3-none-PLATFORM")
    with tempfile.TemporaryDirectory() as directory, zipfile.ZipFile(wheel) as archive:
        archive.extractall(directory)
        package = Path(directory) / "flatmtl"
        faults += [f"{name} is missing" for name in EXPECTED if not (package / name).is_file()]
        for path in sorted(package.rglob("*.so*")):
            faults += [f"{path.relative_to(package)} {fault}" for fault in shared_object_faults(path)]
            versions = ", ".join(f"{name} {version}" for name, version in newest_versions(path).items())
            print(f"{path.relative_to(package)}: {path.stat().st_size / 1024:.0f} kB, needs {versions}")
    print(f"{wheel.name}: {wheel.stat().st_size / 1024:.0f} kB")
    print("\n".join(faults) or "self-contained")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))

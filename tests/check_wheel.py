"""Checks a built wheel: its tag, what its shared objects need, that they hold no CPython symbol, and that those that use
torch use its stable interface alone, as of the oldest torch that is promised.

    python tests/check_wheel.py dist/flatmtl-*.whl

A wheel is self-contained if its shared objects need only torch's own libraries, which the process has loaded when
flatmtl is imported, and the libraries that every manylinux policy lets a wheel take from the system. auditwheel says
which policy its symbol versions fit: that of the machine it was built on.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

TORCH = {"libtorch_cpu.so", "libtorch.so", "libc10.so"}
MANYLINUX = {"libc.so.6", "libm.so.6", "libgcc_s.so.1", "libstdc++.so.6", "libpthread.so.0", "libdl.so.2", "librt.so.1"}
LOADER = re.compile(r"ld-linux.*\.so\.\d+")
OLDEST_TORCH = "2.10.0"
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


def policy_faults(wheel: Path) -> list[str]:
    """What keeps auditwheel from giving the wheel a manylinux tag, but for torch's own libraries."""
    command = [sys.executable, "-m", "auditwheel", "show", "--json", wheel]
    report = json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)
    print(f"auditwheel: {report['sym_tag']}, besides {', '.join(report['external_libs']) or 'nothing'}")
    faults = [f"auditwheel: needs {name}" for name in sorted(set(report["external_libs"]) - TORCH)]
    if not report["sym_tag"].startswith("manylinux"):
        faults.append(f"auditwheel: its symbols fit {report['sym_tag']} alone")
    return faults


def torch_abi_faults(path: Path) -> list[str]:
    """What of torch a shared object uses that is not in the stable interface of OLDEST_TORCH."""
    command = [Path(sys.executable).parent / "torch-abi-audit", "--json", path]
    report = json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)
    faults = []
    for library in report["bundled_libs"] + report["extensions"]:
        found = library["torch"]
        if not found["uses_torch"]:
            continue
        oldest = found["min_torch_version"]
        print(f"torch-abi-audit: {found['stable_shim_count']} stable symbols, torch >= {oldest}")
        faults += [f"uses torch's {symbol}, which is not stable" for symbol in found["unstable_symbols"]]
        if not found["stable"] or oldest is None or _numbers(oldest) > _numbers(OLDEST_TORCH):
            faults.append(f"needs torch {oldest}, not {OLDEST_TORCH}")
    return faults


def _numbers(version: str) -> list[int]:
    return [int(part) for part in version.split(".")]


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
            found = shared_object_faults(path) + (torch_abi_faults(path) if path.suffix == ".so" else [])
            faults += [f"{path.relative_to(package)} {fault}" for fault in found]
            versions = ", ".join(f"{name} {version}" for name, version in newest_versions(path).items())
            print(f"{path.relative_to(package)}: {path.stat().st_size / 1024:.0f} kB, needs {versions}")
    faults += policy_faults(wheel)
    print(f"{wheel.name}: {wheel.stat().st_size / 1024:.0f} kB")
    print("\n".join(faults) or "self-contained")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))

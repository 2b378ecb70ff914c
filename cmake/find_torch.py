"""Prints the directory of the installed torch, without importing it; exits with 1 if there is none.

pip builds in an isolated environment: torch cannot be imported there, but sysconfig still names the directories of the
environment that pip itself runs in.
"""

import os
import re
import site
import sys
import sysconfig

MINIMUM = (2, 10)


def candidates():
    """Directories that may hold torch, most specific first."""
    yield from sys.path
    for base in (None, sys.base_prefix):  # the base too: virtual environments made with --system-site-packages
        variables = {"base": base, "platbase": base} if base else None
        for name in ("platlib", "purelib"):
            yield sysconfig.get_path(name, vars=variables)
    yield site.getusersitepackages()
    yield from site.getsitepackages()


def version(torch):
    """Version of the torch in a directory, as a tuple of two numbers."""
    try:
        with open(os.path.join(torch, "version.py"), encoding="utf-8") as file:
            found = re.search(r"__version__ = ['\"](\d+)\.(\d+)", file.read())
    except OSError:
        return None
    return (int(found[1]), int(found[2])) if found else None


def main():
    looked = dict.fromkeys(directory for directory in candidates() if directory)
    for directory in looked:
        torch = os.path.join(directory, "torch")
        if not os.path.exists(os.path.join(torch, "include", "torch", "csrc", "stable", "library.h")):
            continue
        found = version(torch)
        if found and found < MINIMUM:
            sys.stderr.write(f"  {torch} is torch {found[0]}.{found[1]}\n")
            continue
        print(torch)
        return 0
    sys.stderr.write("".join(f"  looked in {directory}\n" for directory in looked if os.path.isdir(directory)))
    return 1


if __name__ == "__main__":
    sys.exit(main())

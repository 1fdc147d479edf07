"""Start a program from Python's cache of compiled modules.

    python3 -IS cached.py CACHE PATCH FILE [ARG]...

does what `python3 -IS FILE ARG...` does, but without compiling FILE each
time: the tests start the programs some thousand times. CACHE is a directory
of the test run. PATCH is empty, or Python text that is executed before
`main` is called, with the program as `k`, and `sys`; it makes a limit small
or a call fail.
"""

import sys
from importlib.machinery import SourceFileLoader
from types import ModuleType


def main(cache: str, patch: str, file: str) -> None:
    del sys.argv[:3]
    sys.pycache_prefix = cache
    name = file.rpartition("/")[2].partition(".")[0]
    program = sys.modules[name] = ModuleType(name)
    program.__file__ = file
    code = SourceFileLoader(name, file).get_code(name)
    sys.pycache_prefix = None
    exec(code, vars(program))
    exec(patch, {"k": program, "sys": sys})
    sys.exit(program.main())


main(*sys.argv[1:4])

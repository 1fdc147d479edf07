"""Start a program from Python's cache of compiled modules.

    python3 -IS cached.py CACHE PATCH FILE [ARG]...

does what `python3 -IS FILE ARG...` does, but without compiling FILE each
time: the tests start the programs some thousand times. CACHE is a directory
of the test run. PATCH is empty, or Python text that is executed before
`main` is called, with the program as `k`, and `sys`; it makes a limit small
or a call fail. Constants that it changes are changed in koid's agent, too,
which is its own program; a function is changed in koid alone.
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
    before = dict(vars(program))
    exec(patch, {"k": program, "sys": sys})
    pass_on_constants(program, before)
    sys.exit(program.main())


def pass_on_constants(program: ModuleType, before: dict) -> None:
    """Let the text of koid's agent end with the constants of the program
    that are not as they were `before`."""
    changed = [f"{name} = {value!r}\n" for name, value in vars(program).items()
               if isinstance(value, (int, float, str, tuple))
               and before.get(name) != value]
    text = getattr(program, "agent_program", None)
    if text and changed:
        program.agent_program = lambda *names: "".join(
            [text(*names), *changed])


main(*sys.argv[1:4])

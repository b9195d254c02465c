"""Run many command lines in children of one process that has already imported the package.

    python tests/programs.py < cases.json > results.json

A case is {"program", "arguments", "interrupt"}; a result {"code", "out", "err"}. With "interrupt",
Ctrl-C arrives at the start of the program's `main`. Children start quickly: nothing is reimported,
and no device is used before the fork.
"""

import json
import os
import pathlib
import runpy
import signal
import sys
import tempfile
import traceback

ROOT = pathlib.Path(__file__).parents[1]


def _interrupt(frame, event, argument):
    del argument
    mains = ("__main__", "fsdfm_jax.samples")
    if event == "call" and frame.f_code.co_name == "main" and frame.f_globals["__name__"] in mains:
        sys.setprofile(None)
        signal.raise_signal(signal.SIGINT)


def _child(case, out, err):
    os.dup2(out.fileno(), 1)
    os.dup2(err.fileno(), 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
    sys.argv = [case["program"], *case["arguments"]]
    code = 0
    try:
        if case.get("interrupt"):
            sys.setprofile(_interrupt)
        runpy.run_module(case["program"], run_name="__main__", alter_sys=True)
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def run(case):
    """Run a command line and return its result."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        child = os.fork()
        if not child:
            _child(case, out, err)
        _, status = os.waitpid(child, 0)
        said = []
        for stream in (out, err):
            stream.seek(0)
            said.append(stream.read().decode(errors="replace"))
        return {"code": os.waitstatus_to_exitcode(status), "out": said[0], "err": said[1]}


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    import fsdfm_jax.evaluate.run
    import fsdfm_jax.library
    import fsdfm_jax.samples  # noqa: F401
    import launch.aot  # noqa: F401

    json.dump([run(case) for case in json.load(sys.stdin)], sys.stdout)

"""Eight CPU devices, JAX's strict modes and compilation options for all tests."""

import atexit
import os
import shutil
import tempfile

import jax
import pytest
from absl import flags

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_legacy_prng_key", "error")
jax.config.update("jax_debug_key_reuse", True)

# Tests compile the same programs over and over: here, in the other workers and in the processes
# that tests start. Each is compiled once in a run, or once for all where the variable is set.
_CACHE = os.environ.get("JAX_COMPILATION_CACHE_DIR")
if _CACHE is None:
    _CACHE = tempfile.mkdtemp(prefix="fsdfm_jax_tests_")
    atexit.register(shutil.rmtree, _CACHE, ignore_errors=True)
for _name, _value in (
    ("jax_compilation_cache_dir", _CACHE),
    ("jax_persistent_cache_min_compile_time_secs", 0),
    ("jax_persistent_cache_min_entry_size_bytes", -1),
):
    jax.config.update(_name, _value)
    os.environ[_name.upper()] = str(_value)

# Most of the time of these small programs is LLVM's optimising them. Tests marked `optimised` run
# what users run: those of recorded numbers, those in which vectors of other lengths must give the
# same bits, and those that draw so much that it pays. All do, or none, where the variable is set.
_QUICK = "jax_disable_most_optimizations"
_CHOSEN = os.environ.get(_QUICK.upper())


def _compile_quickly(quick: bool) -> None:
    if quick != jax.config.read(_QUICK):
        jax.clear_caches()  # the setting is no part of their keys
        jax.config.update(_QUICK, quick)
        os.environ[_QUICK.upper()] = str(int(quick))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    if _CHOSEN is None:
        _compile_quickly(item.get_closest_marker("optimised") is None)


def pytest_runtest_teardown(item, nextitem):
    if nextitem is None or nextitem.path != item.path:
        jax.clear_caches()  # what other files compile is something else: a worker grew to gigabytes


@pytest.fixture
def parsed_flags():
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()

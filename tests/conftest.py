"""Eight CPU devices and JAX's strict modes for every test; set before the first JAX call."""

import atexit
import os
import shutil
import tempfile

import jax

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_legacy_prng_key", "error")
jax.config.update("jax_debug_key_reuse", True)

# Tests compile the same programs over and over: here, in the other workers and in the processes
# that tests start. Each is compiled once in a run, or once for all where the variable is set.
_CACHE, _ALL = (
    "JAX_COMPILATION_CACHE_DIR",
    {
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    },
)
if _CACHE not in os.environ:
    os.environ[_CACHE] = tempfile.mkdtemp(prefix="fsdfm_jax_tests_")
    atexit.register(shutil.rmtree, os.environ[_CACHE], ignore_errors=True)
os.environ |= _ALL
jax.config.update("jax_compilation_cache_dir", os.environ[_CACHE])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)

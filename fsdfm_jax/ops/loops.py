"""`lax.scan` and `lax.map` that skip the loop for length 1."""

import jax


def scan(step, carry, inputs):
    """`lax.scan`; a single step is inlined."""
    if len(jax.tree.leaves(inputs)[0]) > 1:
        return jax.lax.scan(step, carry, inputs)
    carry, out = step(carry, jax.tree.map(lambda x: x[0], inputs))
    return carry, jax.tree.map(lambda x: x[None], out)


def map_over(fn, inputs):
    """`lax.map`; a single element is inlined."""
    return scan(lambda _, x: (None, fn(x)), None, inputs)[1]

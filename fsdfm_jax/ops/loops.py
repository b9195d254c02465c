"""Loops of the compiler that are none where there is one step."""

import jax


def scan(step, carry, inputs):
    """`lax.scan`; a single step is taken in place, with no loop around it."""
    if len(jax.tree.leaves(inputs)[0]) > 1:
        return jax.lax.scan(step, carry, inputs)
    carry, out = step(carry, jax.tree.map(lambda x: x[0], inputs))
    return carry, jax.tree.map(lambda x: x[None], out)


def map_over(fn, inputs):
    """`lax.map` of the same kind."""
    return scan(lambda _, x: (None, fn(x)), None, inputs)[1]

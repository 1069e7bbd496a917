"""`jax.jit` that also tells a TPU's compiler what it cannot know: how much of a core's memory one operation may take.

Left to itself the compiler gives each operation so little of the vector memory that the tiles of large products are
small: a decoder layer then runs at two thirds of the speed that its own estimate has with more. `planning` compiles
with the same options, so that what is planned is what runs.
"""

import functools
from collections.abc import Callable

import jax


def compiled(static: tuple[str, ...], vmem_kib: int) -> Callable[[Callable], Callable]:
    """Decorates a function of arrays: `jax.jit` with static arguments, and on a TPU with `vmem_kib` per operation.

    The result has the `lower` of `jax.jit`, and `tpu_options` for the compilation of what that gives. It may not be
    called inside another `jax.jit`, where options of the compiler have no meaning; call the function below it there.
    """

    def decorate(function):
        options = {"xla_tpu_scoped_vmem_limit_kib": str(vmem_kib)}
        anywhere = jax.jit(function, static_argnames=static)
        on_tpu = jax.jit(function, static_argnames=static, compiler_options=options)

        @functools.wraps(function)
        def call(*args, **kwargs):
            return (on_tpu if jax.default_backend() == "tpu" else anywhere)(*args, **kwargs)

        call.lower, call.tpu_options = anywhere.lower, options
        return call

    return decorate

"""`jax.jit` with options for a TPU's compiler. `planning` uses the same, so that what is planned is what runs."""

import functools
from collections.abc import Callable, Mapping

import jax


def compiled(static: tuple[str, ...], tpu_options: Mapping[str, str]) -> Callable[[Callable], Callable]:
    """Decorates a function of arrays: `jax.jit` with static arguments, and on a TPU with these options of the compiler.

    The result has the `lower` of `jax.jit`, and `tpu_options` for the compilation of what that gives. It may not be
    called inside another `jax.jit`, where options of the compiler have no meaning; call the function below it there.
    """

    def decorate(function):
        anywhere = jax.jit(function, static_argnames=static)
        on_tpu = jax.jit(function, static_argnames=static, compiler_options=dict(tpu_options))

        @functools.wraps(function)
        def call(*args, **kwargs):
            return (on_tpu if jax.default_backend() == "tpu" else anywhere)(*args, **kwargs)

        call.lower, call.tpu_options = anywhere.lower, tpu_options
        return call

    return decorate

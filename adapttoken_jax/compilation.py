"""`jax.jit` with options of an accelerator's compiler. `planning` uses the same: what is planned is what runs."""

import functools
from collections.abc import Callable, Mapping

import jax


def compiled(
    static: tuple[str, ...], tpu_options: Mapping[str, str], gpu_options: Mapping[str, bool]
) -> Callable[[Callable], Callable]:
    """Decorates a function of arrays: `jax.jit` with static arguments, and with options of a TPU's or GPU's compiler.

    The result has the `lower` of `jax.jit`, and `tpu_options` for the compilation of what that gives. It may not be
    called inside another `jax.jit`, where options of the compiler have no meaning; call the function below it there.
    """

    def decorate(function):
        jit = functools.partial(jax.jit, function, static_argnames=static)
        anywhere = jit()
        tuned = {"tpu": jit(compiler_options=dict(tpu_options)), "gpu": jit(compiler_options=dict(gpu_options))}

        @functools.wraps(function)
        def call(*args, **kwargs):
            return tuned.get(jax.default_backend(), anywhere)(*args, **kwargs)

        call.lower, call.tpu_options = anywhere.lower, tpu_options
        return call

    return decorate

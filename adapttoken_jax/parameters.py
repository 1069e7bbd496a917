"""The one table of parameters. Initialisation, abstract shapes, shardings, import and export derive from it.

A row reads: where the parameter lives in the model, how its checkpoint tensor becomes ours, and its checkpoint key.
The middle column names axes by the package's letters: left of the arrow the tensor as stored by Hugging Face, right of
it ours; a group in parentheses is one stored axis. Rows under `layers` are stacked along a leading axis L.

    text.layers.q_kernel    (N H) D -> D N H    model.layers.{}.self_attn.q_proj.weight

Keys are those of the published checkpoints; `canonical_key` maps the newer layout to them.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from adapttoken_jax.config import ModelConfig

_TABLE = """
vision.patch_kernel            D c t p q -> (c t p q) D   visual.patch_embed.proj.weight
vision.layers.norm1            D -> D                     visual.blocks.{}.norm1.weight
vision.layers.qkv_kernel       (3 N H) D -> D (3 N H)     visual.blocks.{}.attn.qkv.weight
vision.layers.qkv_bias         (3 N H) -> (3 N H)         visual.blocks.{}.attn.qkv.bias
vision.layers.o_kernel         D (N H) -> N H D           visual.blocks.{}.attn.proj.weight
vision.layers.o_bias           D -> D                     visual.blocks.{}.attn.proj.bias
vision.layers.norm2            D -> D                     visual.blocks.{}.norm2.weight
vision.layers.gate_kernel      F D -> D F                 visual.blocks.{}.mlp.gate_proj.weight
vision.layers.gate_bias        F -> F                     visual.blocks.{}.mlp.gate_proj.bias
vision.layers.up_kernel        F D -> D F                 visual.blocks.{}.mlp.up_proj.weight
vision.layers.up_bias          F -> F                     visual.blocks.{}.mlp.up_proj.bias
vision.layers.down_kernel      D F -> F D                 visual.blocks.{}.mlp.down_proj.weight
vision.layers.down_bias        D -> D                     visual.blocks.{}.mlp.down_proj.bias
vision.merger_norm             D -> D                     visual.merger.ln_q.weight
vision.merger_in_kernel        F M -> M F                 visual.merger.mlp.0.weight
vision.merger_in_bias          F -> F                     visual.merger.mlp.0.bias
vision.merger_out_kernel       O F -> F O                 visual.merger.mlp.2.weight
vision.merger_out_bias         O -> O                     visual.merger.mlp.2.bias
text.embedding                 V D -> V D                 model.embed_tokens.weight
text.layers.norm1              D -> D                     model.layers.{}.input_layernorm.weight
text.layers.q_kernel           (N H) D -> D N H           model.layers.{}.self_attn.q_proj.weight
text.layers.q_bias             (N H) -> N H               model.layers.{}.self_attn.q_proj.bias
text.layers.k_kernel           (K H) D -> D K H           model.layers.{}.self_attn.k_proj.weight
text.layers.k_bias             (K H) -> K H               model.layers.{}.self_attn.k_proj.bias
text.layers.v_kernel           (K H) D -> D K H           model.layers.{}.self_attn.v_proj.weight
text.layers.v_bias             (K H) -> K H               model.layers.{}.self_attn.v_proj.bias
text.layers.o_kernel           D (N H) -> N H D           model.layers.{}.self_attn.o_proj.weight
text.layers.norm2              D -> D                     model.layers.{}.post_attention_layernorm.weight
text.layers.gate_kernel        F D -> D F                 model.layers.{}.mlp.gate_proj.weight
text.layers.up_kernel          F D -> D F                 model.layers.{}.mlp.up_proj.weight
text.layers.down_kernel        D F -> F D                 model.layers.{}.mlp.down_proj.weight
text.norm                      D -> D                     model.norm.weight
text.head                      V D -> D V                 lm_head.weight
"""


@dataclasses.dataclass(frozen=True)
class Parameter:
    """One row of the table with the sizes of one model filled in.

    Attributes:
      path: attribute path in the model, for example ("text", "layers", "q_kernel").
      shape: our shape, with the leading L where `layers` is set.
      axes: one letter (or parenthesised group) per axis of `shape`.
      key: checkpoint key; "{}" stands for the layer.
      layers: number of stacked layers, None for a parameter outside the stacks.
      stored_shape: shape of one checkpoint tensor.
      split, order: how a stored tensor becomes ours: reshape to `split`, transpose by `order`, reshape to ours.
    """

    path: tuple[str, ...]
    shape: tuple[int, ...]
    axes: tuple[str, ...]
    key: str
    layers: int | None
    stored_shape: tuple[int, ...]
    split: tuple[int, ...]
    order: tuple[int, ...]

    @property
    def keys(self) -> tuple[str, ...]:
        """Checkpoint keys of this parameter, in layer order."""
        return (self.key,) if self.layers is None else tuple(self.key.format(i) for i in range(self.layers))

    @property
    def layer_shape(self) -> tuple[int, ...]:
        """Our shape of one checkpoint tensor: `shape` without L."""
        return self.shape if self.layers is None else self.shape[1:]

    def from_stored(self, tensor):
        """One checkpoint tensor -> our layout. A pure permutation of elements; NumPy or JAX array."""
        return tensor.reshape(self.split).transpose(self.order).reshape(self.layer_shape)

    def to_stored(self, array):
        """The exact inverse of `from_stored`."""
        split = tuple(self.split[i] for i in self.order)
        return array.reshape(split).transpose(tuple(np.argsort(self.order))).reshape(self.stored_shape)


def _sizes(config: ModelConfig, tower: str) -> dict[str, int]:
    if tower == "text":
        c = config.text
        return {"D": c.width, "N": c.heads, "K": c.kv_heads, "H": c.head_dim, "F": c.ff, "V": c.vocab}
    c = config.vision
    sizes = {"D": c.width, "N": c.heads, "H": c.head_dim, "F": c.ff, "O": c.out_width, "3": 3}
    return sizes | {"c": c.channels, "t": c.temporal_patch, "p": c.patch, "q": c.patch}


def _merger_sizes(config: ModelConfig) -> dict[str, int]:
    merged = config.vision.width * config.vision.merge**2
    return {"M": merged, "F": merged, "O": config.vision.out_width, "D": config.vision.width}


def _axes(pattern: str) -> list[tuple[str, ...]]:
    """ "(N H) D" -> [("N", "H"), ("D",)]."""
    return [tuple(token.strip("()").split()) for token in re.findall(r"\([^)]*\)|\S+", pattern)]


def _parameter(path: str, pattern: str, key: str, config: ModelConfig) -> Parameter:
    names = tuple(path.split("."))
    sizes = _merger_sizes(config) if names[1].startswith("merger") else _sizes(config, names[0])
    stored, ours = (_axes(side) for side in pattern.split("->"))
    split = [axis for group in stored for axis in group]
    order = [split.index(axis) for group in ours for axis in group]
    product = lambda groups: tuple(math.prod(sizes[a] for a in group) for group in groups)
    layers = {"text": config.text.layers, "vision": config.vision.layers}[names[0]] if "layers" in names else None
    stack = () if layers is None else (layers,)
    return Parameter(
        path=names,
        shape=stack + product(ours),
        axes=axes(*names),
        key=key,
        layers=layers,
        stored_shape=product(stored),
        split=tuple(sizes[axis] for axis in split),
        order=tuple(order),
    )


def _rows() -> list[list[str]]:
    return [re.split(r"\s{2,}", line) for line in _TABLE.strip().splitlines()]


@functools.cache
def axes(*path: str) -> tuple[str, ...]:
    """`Parameter.axes` of the parameter at this path, the same for every model."""
    pattern = next(pattern for name, pattern, _ in _rows() if name == ".".join(path))
    return ("L",) * ("layers" in path) + tuple("".join(group) for group in _axes(pattern.split("->")[1]))


@functools.lru_cache(maxsize=32)
def parameters(config: ModelConfig) -> tuple[Parameter, ...]:
    """All parameters of a model. A tied head is one parameter used twice: it has no row of its own."""
    table = [_parameter(*row, config) for row in _rows()]
    return tuple(p for p in table if not (config.text.tied and p.path == ("text", "head")))


def canonical_key(key: str) -> str:
    """A key of either layout (`model.language_model.…` and `model.visual.…`, or the hub's) -> the hub's."""
    key = re.sub(r"^model\.language_model\.", "model.", key)
    return re.sub(r"^model\.visual\.", "visual.", key)


def tree(config: ModelConfig, leaf: Callable[[Parameter], object]) -> dict:
    """The nested dictionary of parameters, with `leaf(parameter)` at every leaf."""
    root: dict = {}
    for parameter in parameters(config):
        node = root
        for name in parameter.path[:-1]:
            node = node.setdefault(name, {})
        node[parameter.path[-1]] = leaf(parameter)
    return root


def leaves(config: ModelConfig, values: dict) -> Iterator[tuple[Parameter, object]]:
    """Pairs every row of the table with its leaf of the nested dictionary `values`."""
    for parameter in parameters(config):
        yield parameter, functools.reduce(lambda node, name: node[name], parameter.path, values)


def abstract(config: ModelConfig, dtype=jnp.float32) -> dict:
    """Shapes without storage, for `eval_shape`, compilation and restoring."""
    return tree(config, lambda p: jax.ShapeDtypeStruct(p.shape, dtype))


def count(config: ModelConfig) -> int:
    """Number of parameters; a tied head counts once."""
    return sum(math.prod(p.shape) for p in parameters(config))


def initialise(config: ModelConfig, key: jax.Array, dtype=jnp.float32) -> dict:
    """Random parameters: ones for norms, zeros for biases, 0.02 for the embedding, 1/sqrt(fan-in) for kernels."""
    keys = iter(jax.random.split(key, len(parameters(config))))
    return tree(config, lambda p: _initial(p, next(keys), dtype))


def _initial(parameter: Parameter, key: jax.Array, dtype) -> jax.Array:
    name = parameter.path[-1]
    if "norm" in name:
        return jnp.ones(parameter.shape, dtype)
    if name.endswith("bias"):
        return jnp.zeros(parameter.shape, dtype)
    deviation = 0.02 if name == "embedding" else math.prod(parameter.stored_shape[1:]) ** -0.5
    return (jax.random.normal(key, parameter.shape) * deviation).astype(dtype)

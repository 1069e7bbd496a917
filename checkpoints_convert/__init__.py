"""Weights in and out: Hugging Face safetensors and Orbax checkpoints, read to shardings, converted bit by bit.

`load.load_parameters` reads either format, `convert.convert` turns one into the other. Everything derives from the
parameter table in `adapttoken_jax.parameters`. No PyTorch anywhere.
"""

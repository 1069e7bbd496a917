"""Checks of this library against PyTorch. Only this package and the tests import torch and transformers."""

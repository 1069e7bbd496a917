"""Tests of `checkpoints_convert`."""

"""Megatron-core models, engines and checkpoints: the only package that imports Megatron."""

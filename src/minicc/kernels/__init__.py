"""Kernels: what runs on each target."""

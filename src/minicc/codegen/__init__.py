"""From kernels to source text and object files."""

"""CPU kernels: the words they are written in, the templates, and the native executor."""

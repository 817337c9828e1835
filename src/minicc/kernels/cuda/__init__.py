"""CUDA kernels: templates, and the words they are written in. Imported only where kernels are compiled."""

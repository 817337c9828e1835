"""Running programs on NVIDIA GPUs. Needs the driver and nothing else."""

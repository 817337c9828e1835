"""Running compiled programs: loading objects, the executor, the kernel store."""

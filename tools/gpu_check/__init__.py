"""Checks and times compiled models on a GPU machine that has neither Numba nor onnx.

    python -m tools.gpu_check build --out DIR [--target cuda:sm_90] [--models NAME,...] [--precisions fp32,fp16]
    python -m tools.gpu_check run DIR --json FILE [--seconds 540]
    python -m tools.gpu_check facts DIR                  # registers, spills, instructions by kernel family
    python -m tools.gpu_check show FILE                  # the table of a run again

`build` compiles models here and packs artifacts, inputs and expected outputs into DIR.tar.xz; `run` unpacks it there (a folder or
the archive), compares every model with the expected outputs, times it beside PyTorch and ONNX Runtime, and always prints and
writes what it has by the end of its time. A bundle for target "cpu" runs anywhere: so the tool itself is tested without a GPU.
"""

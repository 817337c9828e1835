"""Affine folding: BatchNormalization, per-channel scales and biases, and zero padding, into convolutions and products. (The lead writes this one.)"""

"""The small trained model and held-out images of `minicc demo`; tools/train_demo.py makes both."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

_FOLDER = Path(__file__).resolve().parent


def model_path() -> Path:
    """The classifier: image float32 [batch, 1, 8, 8], grey levels 0 to 16; probabilities [batch, 10]."""
    return _FOLDER / "digits.onnx"


def load_images() -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Images the model has never seen, uint8 [360, 8, 8], grey levels 0 to 16, and labels, uint8 [360]."""
    with np.load(_FOLDER / "digits.npz", allow_pickle=False) as archive:
        return archive["images"], archive["labels"]

"""The shipped demo model: its files are small and sound, and it recognises images it was not trained on."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime

from minicc.demo import load_images, model_path


def test_images_are_raw_grey_levels() -> None:
    images, labels = load_images()
    assert images.shape == (360, 8, 8) and images.dtype == np.uint8 and images.max() == 16
    assert labels.shape == (360,) and sorted(set(labels.tolist())) == list(range(10))


def test_model_is_small_and_valid() -> None:
    assert model_path().stat().st_size < 200_000
    onnx.checker.check_model(onnx.load(model_path()), full_check=True)


def test_held_out_accuracy() -> None:
    images, labels = load_images()
    session = onnxruntime.InferenceSession(str(model_path()), providers=["CPUExecutionProvider"])
    (probabilities,) = session.run(None, {"image": images[:, None].astype(np.float32)})
    assert (probabilities.argmax(axis=1) == labels).mean() >= 0.97


def test_batches_of_any_size_give_the_same_rows() -> None:
    images, _ = load_images()
    session = onnxruntime.InferenceSession(str(model_path()), providers=["CPUExecutionProvider"])
    batch = images[:3, None].astype(np.float32)
    (three,) = session.run(None, {"image": batch})
    (one,) = session.run(None, {"image": batch[1:2]})
    np.testing.assert_allclose(one, three[1:2], rtol=1e-5, atol=1e-7)

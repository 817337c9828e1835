"""Classical models (trees, linear models, support vectors) beside ONNX Runtime.

    python -m benchmarks.classical DIR --export       needs scikit-learn and skl2onnx; LightGBM and XGBoost with onnxmltools
                                                      where they are installed
    python -m benchmarks.classical DIR [--threads 1] [--rows 1,10,100,1000,10000]

The first trains models on random data and writes them; the second times whatever ONNX files with one float input of two axes
lie in a folder, calls alternating in one process, medians in us. Labels may differ where two scores are equal but for rounding.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np

COLUMNS = 30


def export(folder: Path) -> None:
    """Train on 5000 rows of 30 features, and write what can be converted."""
    from skl2onnx import to_onnx
    from sklearn import ensemble, linear_model, svm
    from sklearn.datasets import make_classification, make_regression

    folder.mkdir(parents=True, exist_ok=True)
    x, y = make_classification(5000, COLUMNS, n_informative=12, n_classes=4, random_state=0)
    xr, yr = make_regression(5000, COLUMNS, noise=20, random_state=0)
    x, xr = x.astype(np.float32), xr.astype(np.float32)
    models: dict[str, Any] = {
        "logistic_regression": linear_model.LogisticRegression(max_iter=500).fit(x, y),
        "forest_classifier_100": ensemble.RandomForestClassifier(100, random_state=0).fit(x, y),
        "forest_regressor_100": ensemble.RandomForestRegressor(100, random_state=0).fit(xr, yr),
        "boosting_classifier_100": ensemble.GradientBoostingClassifier(n_estimators=100, random_state=0).fit(x, y),
        "isolation_forest": ensemble.IsolationForest(random_state=0).fit(x),
        "support_vectors": svm.SVC().fit(x, y),
    }
    opsets = {"": 18, "ai.onnx.ml": 3}
    for name, model in models.items():
        options = {id(model): {"zipmap": False}} if hasattr(model, "classes_") else None
        (folder / f"{name}.onnx").write_bytes(to_onnx(model, x[:1], target_opset=opsets, options=options).SerializeToString())
    _export_boosted(folder, x, y, xr, yr)


def _export_boosted(folder: Path, x: Any, y: Any, xr: Any, yr: Any) -> None:
    """LightGBM's and XGBoost's, where they and their converter are installed."""
    try:
        import lightgbm
        import onnxmltools
        import xgboost
        from onnxmltools.convert.common.data_types import FloatTensorType
    except ImportError as error:
        print(f"left out: {error}")
        return
    kind = [("x", FloatTensorType([None, COLUMNS]))]
    light = lightgbm.LGBMClassifier(n_estimators=100, verbose=-1).fit(x, y)
    proto = onnxmltools.convert_lightgbm(light, initial_types=kind, zipmap=False, target_opset=15)
    (folder / "lightgbm_classifier_100.onnx").write_bytes(proto.SerializeToString())
    boosted = {
        "classifier_100": xgboost.XGBClassifier(n_estimators=100).fit(x, y),
        "regressor_300": xgboost.XGBRegressor(n_estimators=300).fit(xr, yr),
    }
    for name, model in boosted.items():
        proto = onnxmltools.convert_xgboost(model, initial_types=kind, target_opset=15)
        (folder / f"xgboost_{name}.onnx").write_bytes(proto.SerializeToString())


def measure(path: Path, threads: int, rows: list[int]) -> str:
    """A line of the table: minicc / ONNX Runtime (ratio) for each number of rows."""
    import minicc
    from benchmarks.compare import interleaved, milliseconds, session

    runtime = session(path, threads)
    module = minicc.compile(path, threads=threads)
    given, rng = runtime.get_inputs()[0], np.random.default_rng(0)
    found = []
    for count in rows:
        feeds = {given.name: (rng.standard_normal((count, given.shape[1])) * 2).astype(np.float32)}
        calls = [lambda: module.run(None, feeds), lambda: runtime.run(None, feeds)]  # noqa: B023  called at once
        for call in calls:
            call()
        a, b = (milliseconds(taken) * 1e3 for taken in interleaved(calls, 0.4))
        found.append(f"{a:.0f} / {b:.0f} ({b / a:.2f})")
    return f"| {path.stem} | {' | '.join(found)} |"


def main() -> None:
    parser = argparse.ArgumentParser("benchmarks.classical", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--export", action="store_true", help="train and write models instead of timing them")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rows", default="1,10,100,1000,10000")
    options = parser.parse_args()
    if options.export:
        export(options.folder)
        return
    rows = [int(n) for n in options.rows.split(",")]
    print("| model | " + " | ".join(map(str, rows)) + " |\n" + "|---" * (len(rows) + 1) + "|")
    for path in sorted(options.folder.glob("*.onnx")):
        print(measure(path, options.threads, rows), flush=True)


if __name__ == "__main__":
    main()

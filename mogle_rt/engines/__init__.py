"""The engines that run a step: PyTorch, or onnxruntime and TensorRT with an export."""

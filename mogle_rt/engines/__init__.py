"""What runs a step: PyTorch, or an export by onnxruntime or TensorRT."""

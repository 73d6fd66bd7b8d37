"""Export of trained models for use without PyTorch; needs the extra ``deploy``."""

from sb3_algd.export.onnx_file import export_onnx

__all__ = ["export_onnx"]

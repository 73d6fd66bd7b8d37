"""Export of trained models for use without PyTorch, or without pickle; needs the extra ``deploy``."""

from sb3_algd.export.onnx_file import export_onnx
from sb3_algd.export.policy_file import LoadedPolicy, export_policy, load_policy

__all__ = ["LoadedPolicy", "export_onnx", "export_policy", "load_policy"]

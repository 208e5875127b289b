"""Block-sparse VoCo attention and the K/V path of two-stage VoCo-LLaMA inference (arXiv 2406.12275)."""

from .attention import voco_attention
from .backends import BackendStatus, backend_status, chosen_on_gpus, compiled_module
from .decode import SharedPrefix, decode_attention
from .draw import draw, draw_on, draw_plan
from .kv_cache import VocoKV
from .kv_path import ExtractionPlan, InjectionPlan, extract_kv, inject_kv
from .layout import Image, Text, VocoLayout
from .store import VocoStore
from .version import __version__

__all__ = [
    "BackendStatus",
    "ExtractionPlan",
    "Image",
    "InjectionPlan",
    "SharedPrefix",
    "Text",
    "VocoKV",
    "VocoLayout",
    "VocoStore",
    "__version__",
    "backend_status",
    "chosen_on_gpus",
    "compiled_module",
    "decode_attention",
    "draw",
    "draw_on",
    "draw_plan",
    "extract_kv",
    "inject_kv",
    "voco_attention",
]

"""What the VoCo-LLaMA paper reports of inference, of its own hardware; never in a table with ours."""

# Systems, as table 7 and our own measurements of it call them.
NO_CACHE, FULL = "no cache", "full caching"
SOURCE = "VoCo-LLaMA, arXiv 2406.12275, table 7"
# MB are 10^6 bytes; `time_ms` is the paper's "CUDA time".
TABLE7 = {
    NO_CACHE: {"kv_length": None, "kv_bytes": None, "flops": 9.6e12, "time_ms": 440.5},
    FULL: {"kv_length": 576, "kv_bytes": 302.4e6, "flops": 1.2e12, "time_ms": 154.9},
    "voco 1": {"kv_length": 1, "kv_bytes": 0.525e6, "flops": 0.5e12, "time_ms": 134.0},
}

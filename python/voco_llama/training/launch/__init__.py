"""Settings for `accelerate launch`: DDP, FSDP2 and DeepSpeed ZeRO-3. README.md beside this file says how to use them."""

from pathlib import Path

LAUNCH = Path(__file__).parent

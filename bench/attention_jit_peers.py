"""Attention with a mask by kernels that are compiled at run time: FlashAttention 4's mask_mod and cuDNN's flex attention.

Neither has ever run: there was no GPU of compute capability 9.0 to write this on. It follows the sources of flash-attn-4
4.0.0b36 (`flash_attn/cute`, and how torch 2.13's FlexAttention calls it), for which forward and backward with this mask were
compiled without a GPU, and of nvidia-cudnn-frontend 1.32.0 (`cudnn/flex_attention`), of which only the plan's first kernels
could be. Their results are held to the truth like everyone's before anything is timed.
"""

from functools import cached_property

import torch
from torch.nn.attention.flex_attention import create_block_mask
from voco_llama.bench.results import version_of

from bench.attention_masks import MaskRule, block_masks, key_intervals
from bench.attention_problem import ROWS, Problem


def block_of(device: torch.device) -> tuple[int, int]:
    """(queries, keys) of FlashAttention 4's blocks: its kernels work through two tiles of 128 rows at once from 10.0 on."""
    major = torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 9
    return (256 if major in (10, 11) else 128, 128)


def absent_fa4(device: torch.device) -> str | None:
    """Why FlashAttention 4 is not here."""
    return _absent(FlashAttention4.PACKAGE, device)


def absent_cudnn(device: torch.device) -> str | None:
    """Why cuDNN's flex attention is not here."""
    return _absent(CudnnFlex.PACKAGE, device)


def _absent(package: str, device: torch.device) -> str | None:
    if device.type != "cuda":
        return f"{package} needs an NVIDIA GPU"
    capability = torch.cuda.get_device_capability(device)
    if capability < (9, 0):
        return f"its masks need compute capability 9.0, not {capability[0]}.{capability[1]}"
    return None if version_of(package) else f"{package} is not installed"


class FlashAttention4:
    """mask_mod with block sparsity: blocks are skipped, and elements asked about only in those that are partly visible."""

    PACKAGE = "flash-attn-4"

    def __init__(self, problem: Problem):
        self._problem = problem

    def plan(self):
        """Which blocks are visible, for the forward and, seen from the keys, for the backward."""
        from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch

        block = block_of(self._problem.device)
        found = self._build(block)
        by_queries = (found.kv_num_blocks, found.kv_indices, found.full_kv_num_blocks, found.full_kv_indices)
        by_keys = (found.q_num_blocks, found.q_indices, found.full_q_num_blocks, found.full_q_indices)
        # Counts and indices of the blocks that are partly and of those that are wholly visible.
        return tuple(BlockSparseTensorsTorch(*side, block_size=block) for side in (by_queries, by_keys))

    def attention(self, q, k, v):
        """out of q, k, v [1, N, H, D]."""
        from flash_attn.cute import flash_attn_func

        forward, backward = self._blocks
        tensors = [self._rule.own_begin, self._rule.outside_begin, self._rule.public_at]
        blocks = {"block_sparse_tensors": forward, "block_sparse_tensors_bwd": backward}
        return flash_attn_func(q, k, v, mask_mod=self._mask_mod, aux_tensors=tensors, **blocks)[0]

    @cached_property
    def _build(self):
        return block_masks(self._problem.layout, torch.compile(create_block_mask, dynamic=False))

    @cached_property
    def _blocks(self):
        return self.plan()

    @cached_property
    def _rule(self) -> MaskRule:
        return MaskRule.of(self._problem.layout)

    @cached_property
    def _mask_mod(self):
        import cutlass
        import cutlass.cute as cute
        from flash_attn.cute import utils

        @cute.jit
        def visible(batch, head, row, key, seqlen_info, aux_tensors):
            own_begin = utils.scalar_to_ssa(aux_tensors[0][row[0]], cutlass.Int32)
            outside_begin = utils.scalar_to_ssa(aux_tensors[1][row[0]], cutlass.Int32)
            public_at = utils.scalar_to_ssa(aux_tensors[2][key[0]], cutlass.Int32)
            return (key <= row) & ((key >= own_begin) | (public_at >= outside_begin))

        return visible


class CudnnFlex:
    """Row intervals: every query lists the keys that it sees, from which a plan of blocks and bits is made."""

    PACKAGE = "nvidia-cudnn-frontend"

    def __init__(self, problem: Problem, backward: bool):
        self._problem, self._backward = problem, backward

    def plan(self):
        """The intervals, and what cuDNN makes of them."""
        from cudnn.flex_attention import create_mask_plan

        intervals = key_intervals(self._problem.layout)
        return create_mask_plan(intervals, *self._problem.inputs(ROWS)[:3], build_backward=self._backward)

    def attention(self, q, k, v):
        """out of q, k, v [1, N, H, D]."""
        from cudnn.flex_attention import flex_attn_func

        return flex_attn_func(q, k, v, mask_plan=self._plan)

    @cached_property
    def _plan(self):
        return self.plan()

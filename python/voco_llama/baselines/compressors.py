"""What makes few tokens of the vision tokens of an image, in the place of LLaVA's projector."""

import math

import torch
from torch import nn
from torch.nn import functional
from transformers import Blip2QFormerModel

from .configuration import CompressedLlavaConfig
from .guide import current_guide


def compressor_of(config: CompressedLlavaConfig) -> nn.Module:
    """The compressor that `config` names: vision tokens [images, T, C] to [images, tokens, E] of the LLaMA."""
    return {"avg_pool": AveragePool, "q_former": QFormer, "llama_vid": LlamaVid}[config.compressor](config)


class GridPool(nn.Module):
    """Means of vision tokens over a grid of cells, as square as the number of tokens allows."""

    def __init__(self, config: CompressedLlavaConfig):
        super().__init__()
        count, vision = config.num_compressed_tokens, config.vision_config
        self.edge = vision.image_size // vision.patch_size
        rows = next(n for n in range(math.isqrt(count), 0, -1) if count % n == 0)
        self.cells = (rows, count // rows)
        if self.cells[1] > self.edge:
            raise ValueError(
                f"num_compressed_tokens must be rows * columns of cells within {self.edge} * {self.edge} vision tokens, but "
                f"was {count} ({self.cells[0]} * {self.cells[1]})"
            )

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """[images, T, C] to [images, tokens, C], row by row; a class token in front of the grid is left out."""
        grid = features[:, -(self.edge**2) :].transpose(1, 2).unflatten(2, (self.edge, self.edge))
        return functional.adaptive_avg_pool2d(grid, self.cells).flatten(2).transpose(1, 2)


class AveragePool(nn.Module):
    """Average pooling and a linear layer (VoCo-LLaMA, arXiv 2406.12275, section 4.2)."""

    def __init__(self, config: CompressedLlavaConfig):
        super().__init__()
        self.pool = GridPool(config)
        self.linear = nn.Linear(config.vision_width, config.text_config.hidden_size)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """[images, T, C] to [images, tokens, E]."""
        return self.linear(self.pool(features.to(self.linear.weight.dtype)))


class QFormer(nn.Module):
    """Learnt queries that read the image by cross-attention (BLIP-2, arXiv 2301.12597, section 3.1), and a linear layer.

    There is a query per token. It starts from random weights, not from BLIP-2's, which fit another tower.
    """

    def __init__(self, config: CompressedLlavaConfig):
        super().__init__()
        width = config.qformer_config.hidden_size
        self.queries = nn.Embedding(config.num_compressed_tokens, width)
        self.norm = nn.LayerNorm(config.vision_width)
        self.qformer = Blip2QFormerModel(config.qformer_config)
        self.linear = nn.Linear(width, config.text_config.hidden_size)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """[images, T, C] to [images, tokens, E]."""
        features = self.norm(features.to(self.norm.weight.dtype))
        queries = self.queries.weight.expand(len(features), -1, -1)
        return self.linear(self.qformer(queries, encoder_hidden_states=features).last_hidden_state)


class LlamaVid(nn.Module):
    """A context token that the text asks for, and pooled content tokens (LLaMA-VID, arXiv 2311.17043, section 3.2).

    The text decoder is a Q-Former that reads the text beside its queries. It starts from random weights, and its vocabulary
    is the LLaMA's: the original has BERT's words and InstructBLIP's weights.
    """

    def __init__(self, config: CompressedLlavaConfig):
        super().__init__()
        decoder, vision, llama = config.qformer_config, config.vision_width, config.text_config.hidden_size
        self.words = nn.Embedding(decoder.vocab_size, decoder.hidden_size)
        self.positions = nn.Embedding(decoder.max_position_embeddings, decoder.hidden_size)
        self.queries = nn.Embedding(config.num_queries, decoder.hidden_size)
        self.norm = nn.LayerNorm(vision)
        self.decoder = Blip2QFormerModel(decoder)
        self.query = nn.Linear(decoder.hidden_size, vision)
        self.key = nn.Linear(vision, vision)
        self.context = nn.Linear(vision, llama)
        self.pool = GridPool(config)
        self.content = nn.Linear(vision, llama)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """[images, T, C] to [images, 1 + tokens, E], the context token first; ValueError without text for each image."""
        features = features.to(self.norm.weight.dtype)
        queries, keys = self.query(self._read(features)), self.key(features)
        weights = (queries @ keys.transpose(1, 2) / keys.shape[-1] ** 0.5).softmax(-1)
        context = (weights @ features).mean(1, keepdim=True)
        return torch.cat([self.context(context), self.content(self.pool(features))], dim=1)

    def _read(self, features: torch.Tensor) -> torch.Tensor:
        """The decoder's queries [images, queries, D] behind text and image."""
        guide = current_guide()
        if len(guide.ids) != len(features):
            raise ValueError(
                f"pixel_values must hold the images of input_ids ({len(guide.ids)}), but held {len(features)} images"
            )
        queries = self.queries.weight.expand(len(features), -1, -1)
        text = self.words(guide.ids) + self.positions.weight[: guide.ids.shape[1]]
        mask = torch.cat([guide.mask.new_ones(queries.shape[:2]), guide.mask], dim=1)
        states = self.decoder(
            torch.cat([queries, text], dim=1),
            query_length=queries.shape[1],
            attention_mask=mask.long(),
            encoder_hidden_states=self.norm(features),
        ).last_hidden_state
        return states[:, : queries.shape[1]]

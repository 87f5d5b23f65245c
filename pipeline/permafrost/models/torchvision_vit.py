"""torchvision's ViT, split before its class token attends to the patches in the last block.

The explained layer is the input of the last block's attention, after its norm, because the patch tokens at the block's
output have no gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torchvision import models

from permafrost.config.models import TorchvisionModelConfig
from permafrost.models.classifier import Classifier, require_size
from permafrost.models.output import Normalize


class TorchvisionVit(Classifier):
    """A ViT, whose features are the patch tokens [B, C, h, w] that are the input of the last block's attention.

    The context [B, 1 + h * w, C] is the residual stream into that block, with the class token first.
    """

    def __init__(self, config: TorchvisionModelConfig, network: models.VisionTransformer) -> None:
        super().__init__()
        assert config.mean is not None
        assert config.std is not None
        self.name = config.name
        self.normalize = Normalize(config.mean, config.std)
        self.inner: nn.Module = network

    @property
    def network(self) -> nn.Module:
        """Network of torchvision."""
        return self.inner

    @property
    def head(self) -> None:
        """None, because the head includes the last block's attention."""
        return

    def forward_trunk(self, images: Tensor) -> tuple[Tensor, Tensor]:
        net: Any = self.inner
        require_size(self.name, images, (net.image_size, net.image_size))
        x = net._process_input(self.normalize(images))
        x = torch.cat([net.class_token.expand(len(x), -1, -1), x], dim=1)
        x = net.encoder.dropout(x + net.encoder.pos_embedding)
        residual: Tensor = net.encoder.layers[:-1](x)
        patches = net.encoder.layers[-1].ln_1(residual)[:, 1:]
        side = net.image_size // net.patch_size
        return patches.transpose(1, 2).unflatten(2, (side, side)), residual

    def forward_head(self, features: Tensor, context: Tensor | None) -> Tensor:
        assert context is not None
        net: Any = self.inner
        block = net.encoder.layers[-1]
        patches = features.flatten(2).transpose(1, 2)
        x = torch.cat([block.ln_1(context[:, :1]), patches], dim=1)
        with sdpa_kernel(SDPBackend.MATH):  # the fused kernels have no second derivative
            x, _ = block.self_attention(x, x, x, need_weights=False)
        x = block.dropout(x) + context
        x = x + block.mlp(block.ln_2(x))
        logits: Tensor = net.heads(net.encoder.ln(x)[:, 0])
        return logits

    def rename_keys(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Rename linear_1 and linear_2, the names of the two MLP layers in published files."""
        renamed = {".mlp.linear_1.": ".mlp.0.", ".mlp.linear_2.": ".mlp.3."}
        for old, new in renamed.items():
            state = {name.replace(old, new): tensor for name, tensor in state.items()}
        return state

"""B-cos SimpleViTs (B-cos form of Beyer et al. 2022): no class token, no bias, no activation.

Parameter names are those of the published B-cos v2 checkpoints. The position embedding is a separate input, whose
contribution to a logit belongs to no pixel (e2KD: the sum of W x over pixels is not the logit).

Shape letters: B batch, n tokens, d their width, p side of a patch.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from permafrost.core.errors import ConfigError
from permafrost.models.bcos.layers import BcosConv2d, BcosLinear, BcosSettings, CenteredNorm, attend

HEAD_WIDTH = 64
_MLP_WIDTH = 4
"""Width of the hidden layer of an MLP, in multiples of the token width."""
_PERIOD = 10_000


def position_embedding(rows: int, columns: int, width: int, device: torch.device) -> Tensor:
    """Fixed 2-D sines and cosines, f32 [rows * columns, width]: a quarter each of sin x, cos x, sin y, cos y.

    device  device to compute on, because a copy would require a synchronization
    """
    place = torch.arange(rows * columns, device=device)[:, None]
    frequencies = _PERIOD ** -(torch.arange(width // 4, device=device) / (width // 4 - 1))
    along_x = place % columns * frequencies
    along_y = place // columns * frequencies
    return torch.cat([along_x.sin(), along_x.cos(), along_y.sin(), along_y.cos()], dim=1)


class Attention(nn.Module):
    """Attention x -> to_out(softmax(q k' / sqrt(64)) v), with the softmax as factor and linear values and output."""

    def __init__(self, shared: BcosSettings, width: int) -> None:
        super().__init__()
        self.mode = shared.mode
        self.norm = CenteredNorm(shared, width)
        self.to_qkv = nn.Linear(width, 3 * width, bias=False)
        self.to_out = BcosLinear(shared, width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Apply attention to tokens [B, n, d], keeping the shape."""
        heads = self.to_qkv(self.norm(x)).view(*x.shape[:2], 3, -1, HEAD_WIDTH)
        # [B, n, 3, heads, 64] -> three times [B, heads, n, 64]
        queries, keys, values = heads.permute(2, 0, 3, 1, 4).unbind()
        attention = torch.softmax(queries @ keys.transpose(2, 3) / HEAD_WIDTH**0.5, dim=3)
        attended = attend(attention.to(values.dtype), values, self.mode)
        out: Tensor = self.to_out(attended.transpose(1, 2).flatten(2))
        return out


class Encoder(nn.Module):
    """Attention and an MLP of two B-cos layers, each with a shortcut."""

    def __init__(self, shared: BcosSettings, width: int) -> None:
        super().__init__()
        self.attn = Attention(shared, width)
        net = nn.Sequential()
        net.add_module("norm", CenteredNorm(shared, width))
        net.add_module("linear1", BcosLinear(shared, width, _MLP_WIDTH * width))
        net.add_module("linear2", BcosLinear(shared, _MLP_WIDTH * width, width))
        self.ff = nn.ModuleDict({"net": net})

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(x)
        mixed: Tensor = self.ff["net"](x)
        return x + mixed


class PatchEmbedding(nn.Module):
    """Embedding [B, 6, H, W] -> tokens [B, n, d], one for each p x p patch of the image or of a stem's output."""

    def __init__(self, shared: BcosSettings, shape: VitShape) -> None:
        super().__init__()
        self.patch = shape.patch
        channels = 6
        self.conv_stem = nn.Sequential()
        for width in shape.stem:
            self.conv_stem.append(BcosConv2d(shared, channels, width, 3, stride=2, padding=1))
            self.conv_stem.append(CenteredNorm(shared, width, of_maps=True))
            self.conv_stem.append(
                nn.Identity()
            )  # placeholder for the ReLU of other networks, counted in the published names
            channels = width
        self.linear = BcosLinear(shared, channels * self.patch**2, shape.width)

    def forward(self, x: Tensor) -> Tensor:
        x, p = self.conv_stem(x), self.patch
        if x.shape[2] % p or x.shape[3] % p:
            raise ConfigError(
                f"a B-cos ViT needs an input whose sides are multiples of its patches of {p} pixels, got "
                f"{x.shape[2]}x{x.shape[3]}; set teacher.input_size, or augment.size for a student, to a multiple"
            )
        batch, channels, height, width = x.shape
        patches = x.reshape(batch, channels, height // p, p, width // p, p)
        tokens: Tensor = self.linear(patches.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2))
        return tokens

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Grid (rows, columns) of the tokens of an image."""
        for _ in range(len(self.conv_stem) // 3):
            height, width = (height + 1) // 2, (width + 1) // 2
        return height // self.patch, width // self.patch


class VitShape(NamedTuple):
    """Parameters of a ViT architecture."""

    width: int
    depth: int
    patch: int
    stem: tuple[int, ...] = ()
    """Channels of the convolutions before the patches, each with stride 2."""


class BcosSimpleVit(nn.Module):
    """SimpleViT [B, 6, H, W] -> raw logits [B, K], computed from the average of the tokens."""

    def __init__(self, shared: BcosSettings, shape: VitShape, num_classes: int) -> None:
        super().__init__()
        self.to_patch_embedding = PatchEmbedding(shared, shape)
        self.transformer = nn.Sequential()
        for index in range(shape.depth):
            self.transformer.add_module(f"encoder_{index}", Encoder(shared, shape.width))
        self.linear_head = nn.Sequential()
        self.linear_head.add_module("norm", CenteredNorm(shared, shape.width))
        self.linear_head.add_module("linear", BcosLinear(shared, shape.width, num_classes))
        self.width = shape.width

    def forward(self, x: Tensor) -> Tensor:
        return self.classify(self.to_patch_embedding(x) + self.positions(x))

    def positions(self, x: Tensor) -> Tensor:
        """Compute the position embedding [n, d] of images [B, 6, H, W]."""
        rows, columns = self.to_patch_embedding.grid(x.shape[2], x.shape[3])
        return position_embedding(rows, columns, self.width, x.device).to(x.dtype)

    def classify(self, tokens: Tensor) -> Tensor:
        """Compute raw logits [B, K] from tokens [B, n, d]."""
        raw: Tensor = self.linear_head(self.transformer(tokens).mean(dim=1))
        return raw

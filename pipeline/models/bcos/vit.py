"""B-cos SimpleViTs (Beyer et al. 2022 made B-cos): no class token, no bias, no activation.

Parameter names are those of the published B-cos v2 checkpoints. The position embedding is an input of
its own: what a logit owes to it is in no pixel (e2KD: sum of W x over pixels is not the logit).

Shape letters: B batch, n tokens, d their width, p side of a patch.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from pipeline.core.errors import ConfigError
from pipeline.models.bcos.layers import BcosConv2d, BcosLinear, BcosSettings, CenteredNorm, attend

HEAD_WIDTH = 64
_MLP_WIDTH = 4
"""In token widths."""
_PERIOD = 10_000


def position_embedding(rows: int, columns: int, width: int, device: torch.device) -> Tensor:
    """Fixed 2-D sines and cosines, f32 [rows * columns, width]: a quarter each of sin x, cos x, sin y, cos y.

    device  where it is made, as a copy would make the device wait
    """
    place = torch.arange(rows * columns, device=device)[:, None]
    frequencies = _PERIOD ** -(torch.arange(width // 4, device=device) / (width // 4 - 1))
    along_x = place % columns * frequencies
    along_y = place // columns * frequencies
    return torch.cat([along_x.sin(), along_x.cos(), along_y.sin(), along_y.cos()], dim=1)


class Attention(nn.Module):
    """x -> to_out(softmax(q k' / sqrt(64)) v): the softmax is a factor, values and output are linear."""

    def __init__(self, shared: BcosSettings, width: int) -> None:
        super().__init__()
        self.mode = shared.mode
        self.norm = CenteredNorm(shared, width)
        self.to_qkv = nn.Linear(width, 3 * width, bias=False)
        self.to_out = BcosLinear(shared, width, width)

    def forward(self, x: Tensor) -> Tensor:
        """[B, n, d] -> the same."""
        heads = self.to_qkv(self.norm(x)).view(*x.shape[:2], 3, -1, HEAD_WIDTH)
        # [B, n, 3, heads, 64] -> three times [B, heads, n, 64]
        queries, keys, values = heads.permute(2, 0, 3, 1, 4).unbind()
        attention = torch.softmax(queries @ keys.transpose(2, 3) / HEAD_WIDTH**0.5, dim=3)
        attended = attend(attention.to(values.dtype), values, self.mode)
        out: Tensor = self.to_out(attended.transpose(1, 2).flatten(2))
        return out


class Encoder(nn.Module):
    """Attention and two B-cos layers, each beside a shortcut."""

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
    """[B, 6, H, W] -> tokens [B, n, d], one for each p x p patch, of the image or of a stem's output."""

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
            )  # where others have a ReLU; published names count it
            channels = width
        self.linear = BcosLinear(shared, channels * self.patch**2, shape.width)

    def forward(self, x: Tensor) -> Tensor:
        x, p = self.conv_stem(x), self.patch
        if x.shape[2] % p or x.shape[3] % p:
            raise ConfigError(
                f"a B-cos ViT takes images that its patches of {p} pixels tile, got {x.shape[2]}x{x.shape[3]}: "
                "set teacher.input_size, or augment.size for a student, to a multiple"
            )
        batch, channels, height, width = x.shape
        patches = x.reshape(batch, channels, height // p, p, width // p, p)
        tokens: Tensor = self.linear(patches.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2))
        return tokens

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """(rows, columns) of the tokens of an image."""
        for _ in range(len(self.conv_stem) // 3):
            height, width = (height + 1) // 2, (width + 1) // 2
        return height // self.patch, width // self.patch


class VitShape(NamedTuple):
    """What tells one ViT from another."""

    width: int
    depth: int
    patch: int
    stem: tuple[int, ...] = ()
    """Channels of the convolutions before the patches, each of stride 2."""


class BcosSimpleVit(nn.Module):
    """[B, 6, H, W] -> raw logits [B, K], from the average of the tokens."""

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
        """The position embedding [n, d] of images [B, 6, H, W]."""
        rows, columns = self.to_patch_embedding.grid(x.shape[2], x.shape[3])
        return position_embedding(rows, columns, self.width, x.device).to(x.dtype)

    def classify(self, tokens: Tensor) -> Tensor:
        """Raw logits [B, K] of tokens [B, n, d]."""
        raw: Tensor = self.linear_head(self.transformer(tokens).mean(dim=1))
        return raw

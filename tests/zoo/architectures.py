"""Small networks of the kinds that people bring, each in a few lines, with random weights in float64."""

import torch
from torch import nn
from torch.nn import functional as F

# Convolutional networks


class Block(nn.Module):
    """A residual block of a CIFAR ResNet."""

    def __init__(self, read, written, stride, norm):
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(read, written, 3, stride, 1, bias=False), norm(written)
        self.conv2, self.norm2 = nn.Conv2d(written, written, 3, 1, 1, bias=False), norm(written)
        self.shortcut = nn.Sequential()
        if stride > 1 or read != written:
            self.shortcut = nn.Sequential(nn.Conv2d(read, written, 1, stride, bias=False), norm(written))

    def forward(self, x):
        y = F.relu(self.norm1(self.conv1(x)), inplace=True)
        y = self.norm2(self.conv2(y))
        y += self.shortcut(x)
        return F.relu(y)


class ResNet(nn.Module):
    """A CIFAR ResNet: four stages of blocks, a mean over pixels, a linear head."""

    def __init__(self, norm=nn.BatchNorm2d, widths=(4, 4, 8, 8), blocks=(2, 2, 2, 2)):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, widths[0], 3, 1, 1, bias=False), norm(widths[0])
        stages, read = [], widths[0]
        for stage, (width, count) in enumerate(zip(widths, blocks)):
            for k in range(count):
                stages.append(Block(read, width, 2 if stage and not k else 1, norm))
                read = width
        self.stages, self.head = nn.Sequential(*stages), nn.Linear(read, 5)

    def forward(self, x):
        x = self.stages(F.relu(self.norm(self.conv(x))))
        x = F.adaptive_avg_pool2d(x, 1)
        return self.head(x.view(x.size(0), -1))


def groups(channels):
    return nn.GroupNorm(2, channels)


class LeNet(nn.Module):
    """LeNet-5 with `view`."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 4, 5, padding=2), nn.Conv2d(4, 6, 5)
        self.fc1, self.fc2, self.fc3 = nn.Linear(6 * 2 * 2, 10), nn.Linear(10, 8), nn.Linear(8, 5)

    def forward(self, x):
        x = F.avg_pool2d(torch.tanh(self.conv1(x)), 2)
        x = F.avg_pool2d(torch.tanh(self.conv2(x)), 2)
        x = x.view(x.size(0), -1)
        return self.fc3(torch.tanh(self.fc2(torch.tanh(self.fc1(x)))))


def vgg():
    layers, read = [], 3
    for width in (4, "pool", 6, 6, "pool", 8, "pool"):
        if width == "pool":
            layers.append(nn.MaxPool2d(2, 2))
        else:
            layers += [nn.Conv2d(read, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
            read = width
    return nn.Sequential(
        *layers,
        nn.AdaptiveAvgPool2d((1, 1)),
        nn.Flatten(),
        nn.Linear(read, 8),
        nn.ReLU(True),
        nn.Dropout(),
        nn.Linear(8, 5),
    )


class DenseNet(nn.Module):
    """Each layer reads what all before it have written, side by side."""

    def __init__(self, growth=3):
        super().__init__()
        self.stem, read = nn.Conv2d(3, 4, 3, padding=1), 4
        self.layers, self.transitions = nn.ModuleList(), nn.ModuleList()
        for _ in range(2):
            block = nn.ModuleList()
            for _ in range(2):
                block.append(
                    nn.Sequential(nn.BatchNorm2d(read), nn.ReLU(), nn.Conv2d(read, growth, 3, padding=1, bias=False))
                )
                read += growth
            self.layers.append(block)
            self.transitions.append(
                nn.Sequential(nn.BatchNorm2d(read), nn.ReLU(), nn.Conv2d(read, read // 2, 1), nn.AvgPool2d(2))
            )
            read //= 2
        self.norm, self.head = nn.BatchNorm2d(read), nn.Linear(read, 5)

    def forward(self, x):
        x = self.stem(x)
        for block, transition in zip(self.layers, self.transitions):
            features = [x]
            for layer in block:
                features.append(layer(torch.cat(features, 1)))
            x = transition(torch.cat(features, 1))
        return self.head(F.relu(self.norm(x)).mean([2, 3]))


class SqueezeExcite(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.reduce, self.widen = nn.Conv2d(channels, 2, 1), nn.Conv2d(2, channels, 1)

    def forward(self, x):
        scale = x.mean((2, 3), keepdim=True)
        return x * torch.sigmoid(self.widen(F.silu(self.reduce(scale))))


class InvertedResidual(nn.Module):
    """A block of MobileNetV2/V3, with squeeze and excitation if asked."""

    def __init__(self, channels, excite=False):
        super().__init__()
        wide = 2 * channels
        self.layers = nn.Sequential(
            nn.Conv2d(channels, wide, 1, bias=False),
            nn.BatchNorm2d(wide),
            nn.Hardswish(),
            nn.Conv2d(wide, wide, 3, padding=1, groups=wide, bias=False),
            nn.BatchNorm2d(wide),
            nn.ReLU6(),
            SqueezeExcite(wide) if excite else nn.Identity(),
            nn.Conv2d(wide, channels, 1, bias=False),
            nn.BatchNorm2d(channels),
        )

    def forward(self, x):
        return x + self.layers(x)


def mobilenet(excite=False):
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1),
        InvertedResidual(4, excite),
        nn.AvgPool2d(2),
        InvertedResidual(4, excite),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 5),
    )


class ConvNeXtBlock(nn.Module):
    """Depthwise convolution, norm and MLP with the channels last, layer scale, residual sum."""

    def __init__(self, channels):
        super().__init__()
        self.depthwise, self.norm = nn.Conv2d(channels, channels, 7, padding=3, groups=channels), nn.LayerNorm(channels)
        self.up, self.down = nn.Linear(channels, 4 * channels), nn.Linear(4 * channels, channels)
        self.gamma = nn.Parameter(torch.full((channels,), 0.5))

    def forward(self, x):
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        y = self.gamma * self.down(F.gelu(self.up(y)))
        return x + y.permute(0, 3, 1, 2)


def convnext():
    return nn.Sequential(
        nn.Conv2d(3, 4, 2, stride=2),
        ConvNeXtBlock(4),
        ConvNeXtBlock(4),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.LayerNorm(4),
        nn.Linear(4, 5),
    )


def double(read, written, ndim=2):
    conv, norm = (nn.Conv2d, nn.BatchNorm2d) if ndim == 2 else (nn.Conv3d, nn.InstanceNorm3d)
    return nn.Sequential(
        conv(read, written, 3, padding=1),
        norm(written),
        nn.ReLU(inplace=True),
        conv(written, written, 3, padding=1),
        nn.ReLU(inplace=True),
    )


class UNet(nn.Module):
    """One step down and up, with transposed convolutions or with interpolation."""

    def __init__(self, transposed=True, ndim=2):
        super().__init__()
        conv, transpose = (nn.Conv2d, nn.ConvTranspose2d) if ndim == 2 else (nn.Conv3d, nn.ConvTranspose3d)
        self.first, self.inner = double(2, 4, ndim), double(4, 6, ndim)
        self.pool = (nn.MaxPool2d if ndim == 2 else nn.MaxPool3d)(2)
        mode = "bilinear" if ndim == 2 else "trilinear"
        self.up = (
            transpose(6, 4, 2, stride=2)
            if transposed
            else nn.Sequential(nn.Upsample(scale_factor=2, mode=mode), conv(6, 4, 1))
        )
        self.last, self.head = double(8, 4, ndim), conv(4, 3, 1)

    def forward(self, x):
        x = self.first(x)
        y = self.up(self.inner(self.pool(x)))
        return self.head(self.last(torch.cat([x, y], dim=1)))


# Transformers


class Attention(nn.Module):
    """Self-attention as vision transformers write it: one linear layer for queries, keys and values."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads, self.qkv, self.out = heads, nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x):
        B, N, C = x.shape
        q, k, v = self.qkv(x).reshape(B, N, 3, self.heads, C // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        scores = (q @ k.transpose(-2, -1)) * (C // self.heads) ** -0.5
        return self.out((scores.softmax(dim=-1) @ v).transpose(1, 2).reshape(B, N, C))


class EncoderBlock(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.norm1, self.attention, self.norm2 = nn.LayerNorm(width), Attention(width, heads), nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x):
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class ViT(nn.Module):
    """A vision transformer with a class token, with or without position embedding."""

    def __init__(self, positions=True, width=8, heads=2, depth=2, patch=2, size=8):
        super().__init__()
        self.patches = nn.Conv2d(3, width, patch, stride=patch)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.positions = nn.Parameter(torch.zeros(1, (size // patch) ** 2 + 1, width)) if positions else None
        self.blocks = nn.Sequential(*(EncoderBlock(width, heads) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 5)

    def forward(self, x):
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], dim=1)
        if self.positions is not None:
            x = x + self.positions
        return self.head(self.norm(self.blocks(x))[:, 0])


def encoder():
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2, enable_nested_tensor=False)


class SetTransformer(nn.Module):
    """Attention among the elements, and from one seed to all of them."""

    def __init__(self, features=3, width=8):
        super().__init__()
        self.embed = nn.Linear(features, width)
        self.among = nn.MultiheadAttention(width, 2, batch_first=True)
        self.seed = nn.Parameter(torch.randn(1, 1, width))
        self.pool, self.head = nn.MultiheadAttention(width, 2, batch_first=True), nn.Linear(width, 5)

    def forward(self, x):
        x = self.embed(x)
        x = x + self.among(x, x, x, need_weights=False)[0]
        seed = self.seed.expand(len(x), -1, -1)
        return self.head(self.pool(seed, x, x)[0].squeeze(1))


# Sets, graphs, sequences


class DeepSets(nn.Module):
    def __init__(self, features=3):
        super().__init__()
        self.each = nn.Sequential(nn.Linear(features, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU())
        self.all = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 5))

    def forward(self, x):
        return self.all(self.each(x).sum(dim=1))


class PointNet(nn.Module):
    """Features of every point by convolutions of length one, a maximum over the points, local and global features."""

    def __init__(self):
        super().__init__()
        self.conv1, self.norm1 = nn.Conv1d(3, 6, 1), nn.BatchNorm1d(6)
        self.conv2, self.norm2 = nn.Conv1d(6, 8, 1), nn.BatchNorm1d(8)
        self.head = nn.Conv1d(14, 4, 1)

    def forward(self, x):
        x = x.transpose(2, 1)
        local = F.relu(self.norm1(self.conv1(x)))
        whole = torch.max(self.norm2(self.conv2(local)), 2, keepdim=True)[0]
        whole = whole.repeat(1, 1, local.size(2))
        return self.head(torch.cat([local, whole], 1)).transpose(1, 2)


class MessagePassing(nn.Module):
    """Two rounds of messages over an adjacency matrix, and a mean over the nodes."""

    def __init__(self, features=3, width=6):
        super().__init__()
        self.first, self.second, self.own = (
            nn.Linear(features, width),
            nn.Linear(width, width),
            nn.Linear(features, width),
        )
        self.head = nn.Linear(width, 4)

    def forward(self, x, adjacency):
        degree = adjacency.sum(-1, keepdim=True).clamp(min=1)
        y = torch.relu(adjacency @ self.first(x) / degree + self.own(x))
        y = y + torch.relu(torch.bmm(adjacency, self.second(y)))
        return self.head(y.mean(1))


class Recurrent(nn.Module):
    def __init__(self, kind=nn.LSTM, **options):
        super().__init__()
        self.rnn = kind(3, 4, batch_first=True, **options)
        self.head = nn.Linear(4 * (1 + options.get("bidirectional", False)), 5)

    def forward(self, x):
        return self.head(self.rnn(x)[0][:, -1])


class TextClassifier(nn.Module):
    """A bag of words with a hidden layer."""

    def __init__(self):
        super().__init__()
        self.embedding, self.hidden, self.head = nn.Embedding(11, 6), nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, tokens):
        return self.head(F.relu(self.hidden(self.embedding(tokens).mean(dim=1))))


def mlp():
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1))


class Siamese(nn.Module):
    """One encoder for two images."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 6)
        )

    def forward(self, a, b):
        return F.cosine_similarity(self.encoder(a), self.encoder(b))


class TwoHeads(nn.Module):
    """Outputs in a dictionary."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU())
        self.classes, self.mask = nn.Linear(4, 5), nn.Conv2d(4, 1, 1)

    def forward(self, x):
        x = self.body(x)
        return {"classes": self.classes(x.mean((2, 3))), "mask": self.mask(x)}


class Tied(nn.Module):
    """One layer under two names."""

    def __init__(self):
        super().__init__()
        self.stem, self.first, self.head = nn.Conv2d(1, 4, 1), nn.Conv2d(4, 4, 3, padding=1), nn.Linear(4, 5)
        self.second = self.first

    def forward(self, x):
        x = self.stem(x)
        return self.head(torch.tanh(self.second(torch.tanh(self.first(x)))).mean((-2, -1)))


class Autoencoder(nn.Module):
    """Images through a bottleneck and back, with pixel shuffle."""

    def __init__(self):
        super().__init__()
        self.down, self.up = nn.Conv2d(1, 4, 4, stride=4), nn.Conv2d(4, 16, 3, padding=1)

    def forward(self, x):
        return F.pixel_shuffle(self.up(torch.tanh(self.down(x))), 4)


def normed():
    """Weights under parametrisations."""
    from torch.nn.utils.parametrizations import spectral_norm, weight_norm

    return nn.Sequential(
        weight_norm(nn.Conv2d(1, 4, 3, padding=1)),
        nn.PReLU(4),
        nn.Flatten(),
        spectral_norm(nn.Linear(64, 6)),
        nn.PReLU(),
        nn.Linear(6, 2),
    )


class Gated(nn.Module):
    """Gated linear units, chunks, and a bilinear head."""

    def __init__(self):
        super().__init__()
        self.hidden, self.both, self.head = nn.Linear(6, 8), nn.Linear(4, 8), nn.Bilinear(4, 4, 3)

    def forward(self, x):
        y = F.glu(self.hidden(x))
        a, b = self.both(y).chunk(2, dim=-1)
        return self.head(torch.tanh(a), torch.tanh(b))

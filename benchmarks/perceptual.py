"""ST-LPIPS (Ghildyal and Liu, ECCV 2022), the perceptual distance of the benchmark, from its wheel's trained weights.

It is not LPIPS: an AlexNet made tolerant to small shifts, calibrated like LPIPS. Its weights are the only ones of a
perceptual metric that a package index carries. The wheel's own modules import packages that they do not use, so the
network is stated here.
"""

import importlib.util
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn


WEIGHTS = "weights/vST0.0/alex_shift_tolerant.pth"


class Blur(nn.Module):
    """A fixed 3x3 binomial filter of stride 2 with reflected borders."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("filt", torch.empty(channels, 1, 3, 3))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return F.conv2d(F.pad(features, (2, 2, 2, 2), mode="reflect"), self.filt, stride=2, groups=features.shape[1])


def pool() -> nn.Module:
    return nn.MaxPool2d(3, stride=1)


class STLPIPS(nn.Module):
    """Distance of two batches of pictures (n, 3, h, w) in [-1, 1]: (n,), 0 for equal ones."""

    # The layers' numbers are the names that the weights have.
    STAGES = (
        {"0": nn.Conv2d(3, 64, 11, padding=2), "1": Blur(64), "2": nn.ReLU()},
        {"3": pool(), "4": Blur(64), "5": nn.Conv2d(64, 192, 5, padding=2), "6": nn.ReLU()},
        {"7": pool(), "8": Blur(192), "9": nn.Conv2d(192, 384, 3, padding=1), "10": nn.ReLU()},
        {"11": nn.Conv2d(384, 256, 3, padding=1), "12": nn.ReLU()},
        {"13": nn.Conv2d(256, 256, 3, padding=1), "14": nn.ReLU()},
    )

    def __init__(self) -> None:
        super().__init__()
        spec = importlib.util.find_spec("stlpips_pytorch")
        if spec is None:
            raise ImportError("the benchmark needs `pip install mde-edit[bench]`: stlpips-pytorch is missing")
        state = torch.load(Path(spec.origin).parent / WEIGHTS, map_location="cpu", weights_only=True)
        self.stages = nn.ModuleList(nn.Sequential() for _ in self.STAGES)
        for stage, layers in zip(self.stages, self.STAGES, strict=True):
            for name, layer in layers.items():
                stage.add_module(name, layer)
        self.stages.load_state_dict(
            {
                f"{int(name[len('net.slice')]) - 1}{name[len('net.slice1') :]}": value
                for name, value in state.items()
                if name.startswith("net.")
            }
        )
        for name in ("shift", "scale"):
            self.register_buffer(name, state[f"scaling_layer.{name}"])  # (1, 3, 1, 1)
        for index in range(len(self.stages)):
            self.register_buffer(f"weight{index}", state[f"lin{index}.model.1.weight"])  # (1, channels, 1, 1)
        self.requires_grad_(False).eval()

    def forward(self, one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        features = (torch.cat([one, other]) - self.shift) / self.scale
        total = 0
        for index, stage in enumerate(self.stages):
            features = stage(features)
            first, second = (features / (features.norm(dim=1, keepdim=True) + 1e-10)).chunk(2)
            total = total + F.conv2d((first - second).square(), getattr(self, f"weight{index}")).mean((1, 2, 3))
        return total

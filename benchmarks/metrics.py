"""What an edited picture is worth: the figures of Table 1 and 2, and those that only a known ideal allows.

Pictures are float arrays (h, w, 3) in [0, 1], masks boolean (h, w). A figure that a case cannot give (no ideal, no
judge, an empty background) is NaN; the tables leave those out and count them.
"""

from dataclasses import dataclass

import numpy as np
import torch
from mde_edit.tools.measure import as_array, psnr
from PIL import Image
from torchmetrics.functional.image import structural_similarity_index_measure

from benchmarks.cases import Case, Expected
from benchmarks.perceptual import STLPIPS
from training.judge import Judge, window
from training.scenes import COLORS, KINDS, TEXTURES


NAN = float("nan")
# Where higher is better; the others are distances.
HIGHER = (
    *("success", "bystanders", "clip", "in_psnr", "in_ssim", "bg_psnr", "bg_ssim", "bg_ssim_zf"),
    *("of_ceiling", "small", "larger"),  # of the edits
)
LOWER = ("bg_st_lpips", "bg_st_lpips_zf", "leak")


def dilate(mask: np.ndarray, radius: int) -> np.ndarray:
    """Grown by a square of `radius` pixels."""
    grown = torch.nn.functional.max_pool2d(torch.from_numpy(mask)[None, None].float(), 2 * radius + 1, 1, radius)
    return grown[0, 0].numpy() > 0


def erode(mask: np.ndarray, radius: int) -> np.ndarray:
    return ~dilate(~mask, radius)


def ssim_map(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """SSIM of every pixel (h, w), mean over channels: torchmetrics', 11x11 Gaussian windows of sigma 1.5."""
    one, other = (torch.from_numpy(picture).permute(2, 0, 1)[None] for picture in (one, other))
    _, full = structural_similarity_index_measure(one, other, data_range=1.0, return_full_image=True)
    return full[0].mean(0).numpy()


SSIM_RADIUS = 5


def leak(source: np.ndarray, edited: np.ndarray, inside: np.ndarray) -> float:
    """Share of all change that lies outside the masks; NaN if nothing changed."""
    change = np.abs(source - edited).sum(-1)
    return float(change[~inside].sum() / change.sum()) if change.sum() > 0 else NAN


@dataclass
class Meter:
    """Everything that measuring needs: networks, and how large a latent cell is.

    Attributes:
        perceptual: ST-LPIPS.
        judge: reads pictures of the embedded model's domain; None for others, whose `success`, `bystanders` and `clip`
            are then NaN unless `clip` is given.
        clip: (picture, text) -> cosine, in place of the judge's.
        cell: pixels per latent cell, by which the strict background keeps its distance from the masks.
    """

    perceptual: STLPIPS
    judge: Judge | None = None
    clip: object = None
    cell: int = 4

    def distance(self, one: np.ndarray, other: np.ndarray) -> float:
        one, other = (torch.from_numpy(picture).permute(2, 0, 1)[None].float() for picture in (one, other))
        return self.perceptual(one, other).item()

    def __call__(self, case: Case, image: Image.Image) -> dict[str, float]:
        """All figures of an edited picture.

        `_zf` are the papers' forms: everything inside the masks is filled with zeros in both pictures, so that they
        also depend on how much was edited. The others are strict: only what no perfect edit would change counts, one
        latent cell from the masks on; SSIM from windows wholly in there, ST-LPIPS of the source with the result's
        background pasted in.
        """
        source, edited = as_array(case.image), as_array(image)
        inside = case.union
        strict = ~dilate(inside, self.cell)
        ideal = as_array(case.ideal) if case.ideal else None
        if ideal is not None:
            strict &= ~dilate(np.abs(source - ideal).max(-1) > 0.02, self.cell)
        outside, keep = ~inside[..., None], strict[..., None]
        windows = erode(strict, SSIM_RADIUS)
        figures = {
            "in_psnr": psnr(ideal, edited, inside) if ideal is not None else NAN,
            "in_ssim": float(ssim_map(ideal, edited)[inside].mean()) if ideal is not None else NAN,
            "bg_psnr": psnr(source, edited, strict),
            "bg_ssim": float(ssim_map(source, edited)[windows].mean()) if windows.any() else NAN,
            "bg_ssim_zf": float(ssim_map(source * outside, edited * outside).mean()),
            "bg_st_lpips": self.distance(2 * source - 1, 2 * (edited * keep + source * ~keep) - 1),
            "bg_st_lpips_zf": self.distance((2 * source - 1) * outside, (2 * edited - 1) * outside),
            "leak": leak(source, edited, inside),
        }
        return figures | self.judged(case, image)

    def judged(self, case: Case, image: Image.Image) -> dict[str, float]:
        """Edit success, untouched bystanders and the CLIP score; and each region's verdict, {name: right}, as "edits".

        `success` is the share of the requested edits of which everything asked for is there: the right kind in the
        right place and, where the words name them, its color and texture. `bystanders` is the share of other objects
        that are still what they were.
        """
        figures = {"success": NAN, "bystanders": NAN, "clip": NAN, "edits": {}}
        if self.clip is not None:
            figures["clip"] = self.clip(image, case.target_prompt)
        if self.judge is None:
            return figures
        whole = window(image, (0.0, 0.0, 1.0))
        pictures = [np.asarray(whole), *(np.asarray(window(image, one.window)) for one in case.expected)]
        features = self.judge.encode(np.stack(pictures))
        if self.clip is None:
            figures["clip"] = float(features[0] @ self.judge.encode_text([case.target_prompt])[0])
        kept = []
        for one, feature in zip(case.expected, features[1:], strict=True):
            right = is_right(self.judge, feature[None], one)
            if one.region is None:
                kept.append(right)
            else:
                figures["edits"][one.region] = right
        for name, values in (("success", list(figures["edits"].values())), ("bystanders", kept)):
            if values:
                figures[name] = float(np.mean(values))
        return figures


def is_right(judge: Judge, feature: torch.Tensor, expected: Expected) -> bool:
    """Whether a window's embedding (1, d) shows what is expected there."""
    if (*KINDS, None)[judge.kind(feature).argmax()] != expected.kind:
        return False
    if expected.color is None:
        return True
    if list(COLORS)[judge.color(feature, expected.kind).argmax()] != expected.color:
        return False
    texture = judge.texture(feature, expected.color, expected.kind).argmax()
    return (None, *TEXTURES)[texture] == expected.texture

# Copyright 2026 The MDE-Edit authors. Licensed under the Apache License, Version 2.0.
"""Masks from a segmentation model: a click, a box or a word in, a boolean (height, width) out.

    segment = load_segmenter("facebook/sam-vit-base", detector="google/owlv2-base-patch16-ensemble")
    mask = segment(image, points=[(60, 80)])  # or box=(10, 20, 90, 120), or word="straw hat"

Anything that can be called like this does in its place. The models are transformers'; nothing here is trained or tuned.
"""

from collections.abc import Sequence

import numpy as np
import PIL.Image
import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoModelForMaskGeneration, AutoProcessor, CLIPSegForImageSegmentation, pipeline


Point = tuple[float, float]
Box = tuple[float, float, float, float]


def load_segmenter(name: str, detector: str | None = None, device: str | None = None):
    """A callable `(image, points= | box= | word=) -> mask`.

    Args:
        name: folder or Hub name of a SAM or SAM 2 (clicks, boxes), or of a CLIPSeg (words).
        detector: of an open-vocabulary detector (OWL-ViT, OWLv2, Grounding DINO), which finds a word's box for SAM.
        device: the CPU by default.
    """
    device = device or "cpu"
    if AutoConfig.from_pretrained(name).model_type == "clipseg":
        if detector is not None:
            raise ValueError("`detector` goes with a segmenter of boxes (SAM): CLIPSeg finds words by itself.")
        return WordSegmenter(*_load(CLIPSegForImageSegmentation, name, device))
    finds = None if detector is None else pipeline("zero-shot-object-detection", detector, device=device)
    return PromptSegmenter(*_load(AutoModelForMaskGeneration, name, device), finds)


def _load(kind, name: str, device: str) -> tuple:
    try:
        processor = AutoProcessor.from_pretrained(name)
    except ImportError as error:
        raise ValueError(
            f"{name!r} needs torchvision to read pictures: install the release that goes with your torch, or use"
            " facebook/sam-vit-base, which does without."
        ) from error
    return kind.from_pretrained(name).to(device).eval(), processor


def check_request(image: PIL.Image.Image, points, box, word) -> None:
    """Raise `ValueError` unless one thing is asked for, and it lies in the picture."""
    if sum(value is not None for value in (points, box, word)) != 1:
        raise ValueError("Say what to segment by one of `points`, `box` and `word`.")
    width, height = image.size
    if points is not None:
        if not len(points) or not all(len(point) == 2 for point in points):
            raise ValueError(f"`points` is {points!r}: pass pixels, [(x, y), ...].")
        outside = [point for point in points if not (0 <= point[0] < width and 0 <= point[1] < height)]
        if outside:
            raise ValueError(f"`points` has {outside[0]}, outside of the picture ({width}x{height}).")
    if box is not None:
        if len(box) != 4 or not (0 <= box[0] < box[2] <= width and 0 <= box[1] < box[3] <= height):
            raise ValueError(
                f"`box` is {tuple(box)}: pass (left, top, right, bottom) in pixels of the {width}x{height} picture."
            )
    if word is not None and (not isinstance(word, str) or not word.strip()):
        raise ValueError(f"`word` is {word!r}: name what to segment.")


def check_found(mask: np.ndarray, asked) -> np.ndarray:
    """`mask`, unless it is empty."""
    if not mask.any():
        raise ValueError(f"The segmenter finds nothing for {asked!r}: point at the thing, or draw its mask.")
    return mask


class PromptSegmenter:
    """SAM or SAM 2: points and boxes; with a detector (a pipeline of transformers), words whose score is at least
    `threshold` too."""

    def __init__(self, model, processor, detector=None, threshold: float = 0.1):
        self.model, self.processor, self.detector, self.threshold = model, processor, detector, threshold

    @torch.no_grad()
    def __call__(
        self,
        image: PIL.Image.Image,
        points: Sequence[Point] | None = None,
        box: Box | None = None,
        word: str | None = None,
    ) -> np.ndarray:
        """(height, width) bool: the mask that the model holds for its best.

        Args:
            points: pixels (x, y), all inside the thing. box: (left, top, right, bottom) around it. word: its name.

        Raises:
            ValueError: none or several of these, one outside of the picture, or nothing found.
        """
        check_request(image, points, box, word)
        image = image.convert("RGB")
        asked = points or box or word
        if word is not None:
            box = self.find(image, word)
        if box is not None:
            request = {"input_boxes": [[[float(side) for side in box]]]}
        else:
            request = {"input_points": [[[[float(x), float(y)] for x, y in points]]]}  # image, object, point, xy
        inputs = self.processor(images=image, return_tensors="pt", **request).to(self.model.device)
        out = self.model(**{name: value for name, value in inputs.items() if "sizes" not in name})
        sizes = [inputs[name] for name in ("original_sizes", "reshaped_input_sizes") if name in inputs]
        masks = self.processor.post_process_masks(out.pred_masks.cpu(), *sizes)[0]  # (objects, 3, height, width)
        return check_found(masks[0, out.iou_scores[0, 0].argmax()].bool().numpy(), asked)

    def find(self, image: PIL.Image.Image, word: str) -> Box:
        """The detector's best box for `word`."""
        if self.detector is None:
            raise ValueError(
                "SAM does not read words: pass `detector` (google/owlv2-base-patch16-ensemble), or a CLIPSeg."
            )
        # Grounding DINO was trained on phrases that each end with a period
        period = "." if "grounding" in self.detector.model.config.model_type else ""
        found = []
        for entry in self.detector(image, candidate_labels=[word + period], threshold=0.0):
            x0, y0, x1, y1 = (entry["box"][side] for side in ("xmin", "ymin", "xmax", "ymax"))
            box = max(x0, 0), max(y0, 0), min(x1, image.width), min(y1, image.height)
            if box[0] < box[2] and box[1] < box[3]:
                found.append((entry["score"], box))
        score, box = max(found, default=(0.0, None))
        if box is None or score < self.threshold:
            raise ValueError(
                f"The detector finds no {word!r} in the picture (its best score is {score:.2f}, below"
                f" {self.threshold}): use a box or a point, or another word."
            )
        return box


class WordSegmenter:
    """CLIPSeg: words alone, at a coarse resolution."""

    def __init__(self, model, processor):
        self.model, self.processor = model, processor

    @torch.no_grad()
    def __call__(self, image: PIL.Image.Image, points=None, box=None, word: str | None = None) -> np.ndarray:
        """(height, width) bool: where the model holds `word` for more likely than not.

        Raises:
            ValueError: a point or box instead, or nothing found.
        """
        check_request(image, points, box, word)
        if word is None:
            raise ValueError("CLIPSeg reads words, neither points nor boxes: load a SAM for those.")
        image = image.convert("RGB")
        inputs = self.processor(text=[word], images=[image], padding=True, return_tensors="pt").to(self.model.device)
        logits = self.model(**inputs).logits  # (side, side), or (1, side, side)
        logits = F.interpolate(logits.view(1, 1, *logits.shape[-2:]), image.size[::-1], mode="bilinear")
        return check_found((logits > 0)[0, 0].cpu().numpy(), word)

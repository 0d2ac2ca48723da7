"""The example scenes under the method's variants: `make compare` prints the table that the README quotes.

In: PSNR to the ideal picture inside the masks. Out: PSNR to the source outside masks and ideal change. Share: how
much of an edited word's attention lies inside its mask, mean over words and guided steps.
"""

import json
from pathlib import Path

import numpy as np
import PIL.Image
import torch
from mde_edit import MDEEditPipeline
from mde_edit.cli import as_array, psnr
from mde_edit.losses import resize_mask


ROOT = Path(__file__).parent
PAPER = {"ccl_form": "token_ratio", "ccl_weight": 1.25}
VARIANTS = [  # name, inversion, guidance scale, settings beside 5 iterations
    ("no losses", "direct", 2.5, {"optimization_iterations": 0}),
    ("OAL", "direct", 2.5, {"ccl_weight": 0.0}),
    ("CCL", "direct", 2.5, {"oal_weight": 0.0}),
    ("OAL + Eq. 6 x 1.25 (paper)", "direct", 2.5, PAPER),
    ("OAL + CCL (default)", "direct", 2.5, {}),
    ("default, 15 iterations", "direct", 2.5, {"optimization_iterations": 15}),
    ("default, no cap", "direct", 2.5, {"max_update": None}),
    ("default, masks grown by a cell", "direct", 2.5, {"mask_dilation": 1}),
    ("OAL + Eq. 6 x 1.25 (paper)", "null_text", 1.5, PAPER),
    ("OAL + CCL (default)", "null_text", 1.5, {}),
    ("OAL + CCL (default)", "null_text", 2.5, {}),
    ("OAL + CCL (default)", "negative_prompt", 1.5, {}),
]


def measure(pipe, folder: Path, method: str, scale: float, settings: dict):
    """(in, out, share) of one example."""
    case = json.loads((folder / "edit.json").read_text())
    image, ideal = (PIL.Image.open(folder / f"{name}.png") for name in ("image", "ideal"))
    masks = [{w: PIL.Image.open(folder / f) for w, f in case[kind].items()} for kind in ("object", "attribute")]
    inversion = pipe.invert(image, case["source_prompt"], method=method, guidance_scale=scale)
    settings = {"optimization_iterations": 5, "output_attention_maps": True, **settings}
    out = pipe(case["prompt"], inversion, object_masks=masks[0], attribute_masks=masks[1], **settings)
    source, ideal, edited = (as_array(i) for i in (image, ideal, out.images[0]))
    words = {word: np.asarray(mask) > 127 for word, mask in {**masks[0], **masks[1]}.items()}
    inside = np.any(list(words.values()), axis=0)
    shares = []
    for word, maps in out.attention_maps[0].items():
        after = maps[:, 1]  # (guided steps, h, w)
        share = (after * resize_mask(torch.from_numpy(words[word]), after.shape[-2:])).sum((-1, -2)) / after.sum(
            (-1, -2)
        )
        shares.append(float(share.mean()))
    untouched = ~inside & (np.abs(source - ideal).max(-1) < 0.02)
    return psnr(ideal, edited, inside), psnr(source, edited, untouched), np.mean(shares)


def main() -> None:
    pipe = MDEEditPipeline.from_pretrained(ROOT.parent / "emoji_ldm")
    pipe.set_progress_bar_config(disable=True)
    folders = sorted(p.parent for p in ROOT.glob("*/edit.json"))
    print("| variant | inversion | guidance | in, dB | out, dB | share |\n|---|---|---|---|---|---|")
    for name, method, scale, settings in VARIANTS:
        rows = [measure(pipe, folder, method, scale, settings) for folder in folders]
        inside, outside, share = np.mean(rows, axis=0)
        print(f"| {name} | {method} | {scale} | {inside:.1f} | {outside:.1f} | {share:.2f} |", flush=True)


if __name__ == "__main__":
    main()

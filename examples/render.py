"""Draws the example pictures, their masks, and the ideal results, from the scene generator that drew the embedded
model's training pictures: `python -m examples.render` in the repository's root."""

import json
from pathlib import Path

import numpy as np
import PIL.Image

from training.scenes import Scene


SIZE = 128  # what the embedded model was trained at

# folder: objects, background, seed, {object index: what it becomes}, masked object words and attribute words by index
EXAMPLES = {
    "cat_straw_hat": (("cat", "straw hat"), "", 1, {0: "dog", 1: "red hat"}, {"dog": 0}, {"red": 1}),
    "cat_and_dog": (("cat", "dog"), "on grass", 5, {0: "dog", 1: "tiger"}, {"dog": 0, "tiger": 1}, {}),
    "ball_and_cat": (
        ("orange ball", "cat"),
        "at the beach",
        2,
        {0: "blue ball", 1: "panda"},
        {"panda": 1},
        {"blue": 0},
    ),
    "two_hats": (
        ("fox", "yellow cap", "dog", "purple hat"),
        "in the snow",
        4,
        {0: "pig", 1: "green cap", 3: "blue hat"},
        {"pig": 0},
        {"green": 1, "blue": 3},
    ),
}
# The embedded model wants less guidance than Stable Diffusion's 7.5, null-text inversion less than direct. It mostly
# looks in the right places, where the defaults guide nothing: here every word is guided, gently, to show the losses.
NULL_TEXT = {"method": "null_text", "guidance_scale": 1.5, "preset": "gentle"}
DIRECT = {"method": "direct", "guidance_scale": 2.5, "preset": "gentle"}


def main() -> None:
    for name, (items, background, seed, edits, objects, attributes) in EXAMPLES.items():
        folder = Path(__file__).parent / name
        folder.mkdir(exist_ok=True)
        scene = Scene.of(*items, background=background, seed=seed)
        ideal = scene.edited(edits)
        drawn = scene.render(SIZE)
        drawn.image.convert("RGB").save(folder / "image.png")
        ideal.render(SIZE).image.convert("RGB").save(folder / "ideal.png")
        for word, index in {**objects, **attributes}.items():
            PIL.Image.fromarray(drawn.visible[index].astype(np.uint8) * 255).save(folder / f"{word}.png")
        config = {
            "image": "image.png",
            "source_prompt": scene.caption().text,
            "prompt": ideal.caption().text,
            "object": {word: f"{word}.png" for word in objects},
            "attribute": {word: f"{word}.png" for word in attributes},
            **(NULL_TEXT if name == "cat_straw_hat" else DIRECT),
        }
        (folder / "edit.json").write_text(json.dumps(config, indent=1) + "\n")


if __name__ == "__main__":
    main()

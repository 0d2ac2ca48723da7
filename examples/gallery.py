"""The README's picture, every example before and after: `python examples/strip.py`, which `make examples` ends with."""

import json
import textwrap
from pathlib import Path

from PIL import Image, ImageDraw


HERE = Path(__file__).parent
SIDE, GAP, LINE, TEXT = 208, 8, 17, 14  # pixels


def main() -> None:
    folders = sorted(path.parent for path in HERE.glob("*/edit.json"))
    width = 2 * SIDE + GAP // 2
    strip = Image.new("RGB", (len(folders) * (width + 3 * GAP) - 3 * GAP, SIDE + GAP + 4 * LINE), "white")
    draw = ImageDraw.Draw(strip)
    for number, folder in enumerate(folders):
        case = json.loads((folder / "edit.json").read_text())
        for place, (name, prompt) in enumerate((("image", case["source_prompt"]), ("edited", case["prompt"]))):
            left = number * (width + 3 * GAP) + place * (SIDE + GAP // 2)
            picture = Image.open(folder / f"{name}.png").convert("RGB")
            strip.paste(picture.resize((SIDE, SIDE), Image.Resampling.LANCZOS), (left, 0))
            for row, line in enumerate(textwrap.wrap(prompt, 27)):
                place_of_line = (left + SIDE // 2, SIDE + GAP + row * LINE)
                draw.text(place_of_line, line, fill="black", font_size=TEXT, anchor="ma")
    strip.save(HERE / "strip.png", optimize=True)


if __name__ == "__main__":
    main()

"""Every example before and after: the README's strip, and `examples/README.md` with masks, settings and figures.
`make gallery`, which `make examples` ends with."""

import json
import textwrap
from pathlib import Path

from PIL import Image, ImageDraw


HERE = Path(__file__).parent
SIDE, GAP, LINE, TEXT = 208, 8, 17, 14  # pixels


def main() -> None:
    folders = sorted(path.parent for path in HERE.glob("*/edit.json"))
    draw_strip(folders)
    (HERE / "README.md").write_text(page(folders), encoding="utf-8")


def page(folders: list[Path]) -> str:
    """The gallery as Markdown, its pictures those of the folders."""
    lines = [
        "# Gallery",
        "",
        "Made by `make examples` (edits) and `make gallery` (this page). Each folder has the edit's settings,",
        "`edit.json`, what it took, `run.json`, and a sheet with attention and losses.",
    ]
    for folder in folders:
        case, run = (json.loads((folder / f"{name}.json").read_text()) for name in ("edit", "run"))
        pictures = [(case["source_prompt"], "image.png")]
        for role in ("object", "attribute"):
            pictures += [(f"{role} <b>{word}</b>", file) for word, file in case[role].items()]
        pictures += [(case["prompt"], "edited.png"), ("what a perfect edit shows", "ideal.png")]
        cells = "".join(f'<td><img src="{folder.name}/{file}" width="150"></td>' for _, file in pictures)
        texts = "".join(f"<td>{text}</td>" for text, _ in pictures)
        settings = run["settings"]
        figures = (
            f"{settings['method']}, {settings['steps']} steps, guidance {settings['guidance_scale']};"
            f" {run['guidance_iterations']} iterations of latent guidance; background PSNR {run['background_psnr']} dB,"
            f" reconstruction {run['reconstruction_psnr']} dB; [sheet]({folder.name}/sheet.png)"
        )
        table = ["<table>", f"<tr>{cells}</tr>", f"<tr>{texts}</tr>", "</table>"]
        lines += ["", f"## {case['source_prompt']} → {case['prompt']}", "", *table, "", figures]
    return "\n".join(lines) + "\n"


def draw_strip(folders: list[Path]) -> None:
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

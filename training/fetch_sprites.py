"""Derive `training/sprites/` from the npm package `@lobehub/fluent-emoji-3d` (Microsoft's Fluent Emoji 3D, MIT).

The sprites are committed; this script is only needed to add one. It fetches the pinned package with the ordinary npm
client, crops each drawing to its outline, shrinks it to `SIZE` px on its long side and stores it as WebP with alpha:

    python -m training.fetch_sprites            # needs npm
    python -m training.fetch_sprites --assets DIR   # an unpacked package/assets folder
"""

import argparse
import subprocess
import tarfile
import tempfile
from pathlib import Path

from PIL import Image

from training.scenes import ANIMALS, HEADWEAR, SPRITES, THINGS


PACKAGE = "@lobehub/fluent-emoji-3d@1.1.0"
STRAP = 58  # where the helmet's strap begins, percent of its height
SIZE = 160  # a sprite fills at most 0.7 of a 256 px scene, so this loses nothing visible


def fetch(folder: Path) -> Path:
    """Fetch and unpack the package into `folder`; returns its assets folder."""
    subprocess.run(["npm", "pack", "--silent", PACKAGE], cwd=folder, check=True, stdout=subprocess.DEVNULL)
    with tarfile.open(next(folder.glob("*.tgz"))) as archive:
        archive.extractall(folder, filter="data")
    return folder / "package" / "assets"


def derive(assets: Path, kind: str, code_point: str) -> None:
    sprite = Image.open(assets / f"{code_point}.webp").convert("RGBA")
    if kind == "helmet":  # without its chin strap, which would hang in the wearer's face
        sprite = sprite.rotate(-14, Image.Resampling.BICUBIC).crop((0, 0, sprite.width, STRAP * sprite.height // 100))
    # Edge pixels of alpha 1-8 would only shift the sprite's anchor.
    sprite = sprite.crop(sprite.getchannel("A").point(lambda a: 255 * (a > 8)).getbbox())
    sprite.thumbnail((SIZE, SIZE), Image.Resampling.LANCZOS)
    sprite.save(SPRITES / f"{kind}.webp", quality=92, alpha_quality=95, method=6)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--assets", type=Path, help="assets folder of the unpacked package (default: fetch it)")
    args = parser.parse_args()
    SPRITES.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        assets = args.assets or fetch(Path(folder))
        for table in (ANIMALS, HEADWEAR, THINGS):
            for kind, entry in table.items():
                derive(assets, kind, entry.code_point)


if __name__ == "__main__":
    main()

"""The photographs of `pycm demo` and the sentences written for them.

All photographs that scikit-image carries inside its package. `core` marks the ten that are shown unasked; of
most others (textures, microscopy, the deep sky) ImageNet has no class, and so the offline encoder no notion.
The sentences were written from the pictures before the first run, and are not changed to suit the result.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from .._optional import require


class Photograph(NamedTuple):
    """A file of skimage.data, the sentences that are true of it, and whether it is shown unasked."""

    file: str
    title: str
    sentences: tuple[str, ...]
    core: bool = True


PHOTOGRAPHS = (
    Photograph(
        "astronaut.png",
        "Astronaut",
        (
            "A smiling woman in an orange space suit sits in front of an American flag.",
            "An astronaut holds her helmet beside a model of the space shuttle.",
        ),
    ),
    Photograph(
        "brick.png",
        "Brick",
        ("Rows of bricks with pale mortar make up a wall.", "The side of a house, brick upon brick."),
        core=False,
    ),
    Photograph(
        "camera.png",
        "Cameraman",
        (
            "A man in a long coat looks through a camera on a tripod.",
            "Someone is filming on a lawn, with towers in the distance.",
        ),
    ),
    Photograph(
        "cell.png",
        "Cell",
        ("A single round cell floats in a salt solution.", "Under the microscope, one bright disc on grey."),
        core=False,
    ),
    Photograph(
        "chelsea.png",
        "Cat",
        ("A tabby cat looks past you with green eyes.", "The whiskers and the nose of a pet, very close."),
    ),
    Photograph(
        "clock_motion.png",
        "Clock",
        (
            "A clock on the wall, blurred because the camera moved.",
            "The time on the dial can no longer be read.",
        ),
    ),
    Photograph(
        "coffee.png",
        "Coffee",
        ("An espresso in a red cup, with a spoon on the saucer.", "A hot drink waits on a wooden table."),
    ),
    Photograph(
        "coins.png",
        "Coins",
        (
            "Ancient Greek coins are laid out in four rows.",
            "A collector's old money on a dark cloth.",
        ),
    ),
    Photograph(
        "grass.png",
        "Grass",
        ("Dry grass and fallen leaves, seen from above.", "A lawn that has been waiting for rain."),
        core=False,
    ),
    Photograph(
        "gravel.png",
        "Gravel",
        ("Small grey stones cover the ground.", "Crushed rock, as it is spread on a garden path."),
        core=False,
    ),
    Photograph(
        "horse.png",
        "Horse",
        ("The black silhouette of a horse that stands still.", "A stallion from the side, cut out of paper."),
    ),
    Photograph(
        "hubble_deep_field.jpg",
        "Deep field",
        (
            "Countless distant galaxies shine in the dark.",
            "A telescope in orbit looked deep into the universe.",
        ),
        core=False,
    ),
    Photograph(
        "ihc.png",
        "Tissue",
        (
            "Stained tissue with brown glands and blue cell nuclei.",
            "A pathologist examines this sample for cancer.",
        ),
        core=False,
    ),
    Photograph(
        "moon.png",
        "Moon",
        ("Craters on the surface of the moon.", "A grey, dusty landscape without air or water."),
    ),
    Photograph(
        "motorcycle_left.png",
        "Motorcycle",
        (
            "A red motorcycle is parked in a garage.",
            "The bike leans on its stand between boxes and tools.",
        ),
        core=False,
    ),
    Photograph(
        "page.png",
        "Page",
        (
            "A printed page with a heading and one paragraph.",
            "Somebody photographed the text of a software manual.",
        ),
    ),
    Photograph(
        "retina.jpg",
        "Retina",
        (
            "Blood vessels spread over the back of a human eye.",
            "An eye doctor took this picture through the pupil.",
        ),
        core=False,
    ),
    Photograph(
        "rocket.jpg",
        "Rocket",
        ("A rocket stands on its launch pad at dusk.", "Floodlights shine on the tower before the lift-off."),
    ),
    Photograph(
        "text.png",
        "Handwriting",
        ("Formulas and letters written by hand.", "Strokes of a pen on a sheet of squared paper."),
        core=False,
    ),
)


def photographs(*, every: bool = False) -> list[Photograph]:
    """Those of everyday things, or all."""
    return [photograph for photograph in PHOTOGRAPHS if every or photograph.core]


def photograph_paths(chosen: Sequence[Photograph]) -> list[Path]:
    """Their files inside the package; nothing is downloaded.

    Raises:
        ImportError: scikit-image is not installed.
        FileNotFoundError: this release of scikit-image does not carry one of them.
    """
    package = require("skimage.data", "demo", "pycm demo")
    folder = Path(str(package.__file__)).parent
    paths = [folder / photograph.file for photograph in chosen]
    for path in paths:
        if not path.is_file():
            raise FileNotFoundError(f"pycm demo: this release of scikit-image does not carry {path.name}")
    return paths

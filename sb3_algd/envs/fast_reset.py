"""Makes a reset of Safety-Gymnasium's navigation tasks many times faster, with the same results bit for bit.

Nearly all of a reset goes into decoding the pictures of a night sky, 190 MB, for the new model. It is the same sky every
time, and nothing but a picture depends on it: the simulated model does without, and what draws gets it once. Most of the
rest goes into finding a layout by trial, for which distances in plain floats are quicker.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import mujoco
import numpy as np
import yaml
from safety_gymnasium import world


class AssetsFile:
    """Stands for the module ``yaml`` in the package's module ``world``, which parses its file of pictures at every reset."""

    FullLoader = yaml.FullLoader

    def __init__(self) -> None:
        self._without_sky: dict[str, Any] = {}
        self.sky: dict[str, str] = {}

    def load(self, file: Any, Loader: Any) -> dict[str, Any]:
        """
        :param file: The opened file, read the first time only.
        :param Loader: How to read it.
        :return: What is in the file, the sky a few grey pixels.
        """
        if not self._without_sky:
            self._without_sky = yaml.load(file, Loader=Loader)
            textures = self._without_sky["textures"]
            self.sky = textures["skybox"]
            textures["skybox"] = {"@type": "skybox", "@builtin": "flat", "@width": "1", "@height": "6"}
        return self._without_sky


ASSETS = AssetsFile()


@contextmanager
def without_sky() -> Iterator[None]:
    """Let the package build its worlds without the sky."""
    original, world.yaml = world.yaml, ASSETS
    try:
        yield
    finally:
        world.yaml = original


def model_with_sky(built: Any) -> Any:
    """
    :param built: The package's world, built :func:`without_sky`.
    :return: A model of the same world with the sky, to be drawn in the same size.
    """
    root = built.xml["mujoco"]
    textures = [ASSETS.sky if texture["@type"] == "skybox" else texture for texture in root["asset"]["texture"]]
    xml = {"mujoco": {**root, "asset": {**root["asset"], "texture": textures}}}
    model = mujoco.MjModel.from_xml_string(world.xmltodict.unparse(xml))
    size, wanted = model.vis.global_, built.model.vis.global_
    size.offwidth, size.offheight = wanted.offwidth, wanted.offheight
    return model


def sample_layout(generator: Any) -> bool:
    """
    Draw a place for every object, as the package's method of that name does.

    :param generator: The task's random generator, whose ``layout`` is set.
    :return: Whether places were found that keep all objects apart.
    """
    margin = generator.placements_margin
    layout: dict[str, np.ndarray] = {}
    taken: list[tuple[float, float, float]] = []
    for name, (placements, keepout) in generator.placements.items():
        for _ in range(100):
            place = generator.draw_placement(placements, keepout)
            x, y = place.tolist()
            if all(distance_between(x, y, *other) >= apart + margin + keepout for *other, apart in taken):
                break
        else:
            return False
        layout[name] = place
        taken.append((x, y, keepout))
    generator.layout = layout
    return True


def distance_between(x: float, y: float, other_x: float, other_y: float) -> float:
    """
    :return: The distance of two points, rounded as NumPy does for ``sqrt(sum(square(...)))``, which `math.hypot` is not.
    """
    dx, dy = x - other_x, y - other_y
    return math.sqrt(dx * dx + dy * dy)

"""Faster resets for Safety-Gymnasium's navigation tasks, with bit-identical results.

A reset spends most of its time on decoding 190 MB of sky textures for the new model. The sky never changes and only
matters for rendering. So the simulated model has no sky, and a viewer gets the textures once. Most of the remaining time
is spent on sampling a layout, where distances in plain floats are faster.
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
    """Replaces ``yaml`` in the package's module ``world``, which would otherwise parse the assets file in every reset."""

    FullLoader = yaml.FullLoader

    def __init__(self) -> None:
        self._without_sky: dict[str, Any] = {}
        self.sky: dict[str, str] = {}

    def load(self, file: Any, Loader: Any) -> dict[str, Any]:
        """
        :param file: The open assets file. Only the first call reads it.
        :param Loader: The YAML loader.
        :return: The content of the file, with a few grey pixels as sky.
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
    """Within this context the package builds worlds without the sky."""
    original, world.yaml = world.yaml, ASSETS
    try:
        yield
    finally:
        world.yaml = original


def model_with_sky(built: Any) -> Any:
    """
    :param built: The package's world, built :func:`without_sky`.
    :return: A model of the same world with the sky, for rendering in the same size.
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
    Draw a position for every object, like the package's method of the same name.

    :param generator: The task's random generator. Its ``layout`` is set.
    :return: Whether a layout was found in which all objects keep their distances.
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
    The distance of two points, rounded like NumPy's ``sqrt(sum(square(...)))``. ``math.hypot`` rounds differently.

    :param x: The x coordinate of the first point.
    :param y: The y coordinate of the first point.
    :param other_x: The x coordinate of the second point.
    :param other_y: The y coordinate of the second point.
    :return: The distance.
    """
    dx, dy = x - other_x, y - other_y
    return math.sqrt(dx * dx + dy * dy)

"""Rendering with MuJoCo."""

import os
import sys
from collections.abc import Iterable
from typing import Any

METADATA = {"render_modes": ["rgb_array", "depth_array"]}
"""The render modes. For ``"human"`` Gymnasium shows the images of ``"rgb_array"`` in a window."""


def choose_backend() -> None:
    """
    Let MuJoCo render through EGL on a Linux machine without a display, unless ``MUJOCO_GL`` is set.

    By default Gymnasium chooses GLFW there, which starts without an error but cannot render.
    """
    has_display = os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")
    if sys.platform == "linux" and not has_display:
        os.environ.setdefault("MUJOCO_GL", "egl")


def make_current(viewers: Iterable[Any]) -> None:
    """
    Make the contexts of these viewers current. Another environment may have rendered or been closed since the last time.

    :param viewers: Gymnasium's viewers, each with its own context.
    """
    for viewer in viewers:
        viewer.make_context_current()


def release(viewers: Iterable[Any]) -> None:
    """
    Free the graphics resources of these viewers while their own context is current.

    The garbage collector would delete them from the context that is current at that time, possibly another environment's.

    :param viewers: Gymnasium's viewers, before they are closed.
    """
    for viewer in viewers:
        viewer.make_context_current()
        viewer.con.free()

"""How the environments draw with MuJoCo."""

import os
import sys
from collections.abc import Iterable
from typing import Any

METADATA = {"render_modes": ["rgb_array", "depth_array"]}
"""What they declare. There is no ``"human"`` of their own: Gymnasium shows the images of ``"rgb_array"`` in a window."""


def choose_backend() -> None:
    """
    Let MuJoCo draw through EGL on a Linux machine without a display, unless ``MUJOCO_GL`` says otherwise.

    Left alone, Gymnasium takes GLFW there, which seems to start and then draws nothing but an error.
    """
    has_display = os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")
    if sys.platform == "linux" and not has_display:
        os.environ.setdefault("MUJOCO_GL", "egl")


def make_current(viewers: Iterable[Any]) -> None:
    """
    Let what is drawn next go to these viewers: another environment may have drawn, or been closed, in between.

    :param viewers: Gymnasium's viewers, each with a drawing context of its own.
    """
    for viewer in viewers:
        viewer.make_context_current()


def release(viewers: Iterable[Any]) -> None:
    """
    Give back what these viewers hold in the graphics driver, as long as it can still be told whose it is.

    Left to the garbage collector, that would be deleted from whichever context is in use by then: another environment's.

    :param viewers: Gymnasium's viewers, about to be closed.
    """
    for viewer in viewers:
        viewer.make_context_current()
        viewer.con.free()

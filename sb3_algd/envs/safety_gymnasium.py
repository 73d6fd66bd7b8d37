"""Makes the released safety-gymnasium 1.0.0 work beside today's Gymnasium, MuJoCo and NumPy.

Its pins fit no current package, so it is installed with ``pip install --no-deps``, and then does not import as it is.
Its files stay untouched; :func:`load` sets from outside what has to differ, once per process:

===============================================  ======================================================================
what fails                                       what is done about it
===============================================  ======================================================================
the package's ``__init__`` imports vector        the package goes into ``sys.modules`` without its ``__init__`` having
environments and wrappers built on modules       run; none of what fails is needed, and the other sub-modules import
that Gymnasium 1.x removed                       as usual
arrays as defaults in dataclasses, refused       the arrays of the colour table become hashable
by Python >= 3.11
``model.jnt(array([3]))``, refused by            while an agent looks up its joint sensors it sees a model that takes
MuJoCo >= 3                                      such an index
``float(array([0.5]))``, refused by              the agents' module gets a ``float`` that takes such an array
NumPy >= 2.4
a viewer without width and height, refused       the viewer is given the size that the model was just told to render
by Gymnasium 1.x
===============================================  ======================================================================

A ``safety_gymnasium`` that imports by itself, a later release or the pinned stack, is used exactly as it is.
"""

import importlib
import importlib.util
import sys
from types import ModuleType
from typing import Any

import gymnasium as gym
import numpy as np

PACKAGE = "safety_gymnasium"
INSTALL_COMMAND = 'pip install "sb3_algd[safety]" && pip install --no-deps safety-gymnasium==1.0.0'


class HashableArray(np.ndarray):
    """An array that a dataclass takes as a default value, since it can be hashed."""

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(self.tobytes())


class ScalarIndexModel:
    """
    A MuJoCo model in which a joint is also found by an index in an array of one element.

    :param model: The ``mujoco.MjModel`` that everything is read from.
    """

    def __init__(self, model: Any) -> None:
        self._model = model

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def jnt(self, index: Any) -> Any:
        """
        :param index: The joint's number, as an int or an array of one element.
        :return: The joint's named view.
        """
        return self._model.jnt(int(scalar(index)))


def scalar(value: Any) -> float:
    """
    :param value: A number, or an array of one element of any shape.
    :return: The same as a Python number.
    """
    return np.asarray(value).item()


def load() -> ModuleType:
    """
    Make ``safety_gymnasium`` importable; after the first call this costs nothing.

    :return: The package. Where :func:`is_adapted` is true its ``__init__`` has not run: only its sub-modules are of use.
    :raises ImportError: If the package, or one that it needs, is missing; the message names the install command.
    """
    if PACKAGE in sys.modules:
        return sys.modules[PACKAGE]
    if importlib.util.find_spec(PACKAGE) is None:
        raise ImportError(f"This environment needs the package safety-gymnasium, which is not installed: {INSTALL_COMMAND}")
    try:
        return import_genuine()
    except Exception:  # noqa: BLE001  Whatever goes wrong in there, it means that the package needs the adapter.
        forget()
    try:
        return import_adapted()
    except ImportError as error:
        forget()
        raise ImportError(
            f"safety-gymnasium is installed, but something that it needs is not ({error}): {INSTALL_COMMAND}"
        ) from error


def is_adapted() -> bool:
    """:return: Whether the package that is loaded is 1.0.0 made to work by this module, not one that works by itself."""
    return getattr(sys.modules.get(PACKAGE), "adapted_by", None) == __name__


def import_genuine() -> ModuleType:
    """
    Import the package as its authors meant it.

    :return: The package.
    """
    ours = dict(gym.registry)
    package = importlib.import_module(PACKAGE)
    # It registers its own environments, whose `step` Gymnasium cannot use, under the ids that were being made just now.
    gym.registry.update(ours)
    return package


def forget() -> None:
    """Remove what a failed import left behind, so that the next attempt starts from nothing."""
    for name in [name for name in sys.modules if name == PACKAGE or name.startswith(PACKAGE + ".")]:
        del sys.modules[name]


def import_adapted() -> ModuleType:
    """
    Import the package without its ``__init__`` and with the repairs listed above.

    :return: The package.
    """
    spec = importlib.util.find_spec(PACKAGE)
    assert spec is not None
    package = importlib.util.module_from_spec(spec)
    package.adapted_by = __name__  # type: ignore[attr-defined]
    sys.modules[PACKAGE] = package

    color = importlib.import_module(PACKAGE + ".assets.color")
    color.COLOR.update({name: array.view(HashableArray) for name, array in color.COLOR.items()})
    repair_agents(importlib.import_module(PACKAGE + ".bases.base_agent"))
    repair_viewer(importlib.import_module(PACKAGE + ".bases.underlying"))
    importlib.import_module(PACKAGE + ".builder")
    return package


def repair_agents(base_agent: Any) -> None:
    """:param base_agent: The package's module of that name."""
    base_agent.float = scalar
    look_up_sensors = base_agent.BaseAgent._init_jnt_sensors

    def look_up_sensors_by_int(agent: Any) -> None:
        engine = agent.engine
        agent.engine = base_agent.Engine(ScalarIndexModel(engine.model), engine.data)
        look_up_sensors(agent)
        agent.engine = engine

    base_agent.BaseAgent._init_jnt_sensors = look_up_sensors_by_int


def repair_viewer(underlying: Any) -> None:
    """:param underlying: The package's module of that name."""
    viewer_class = underlying.OffScreenViewer

    def sized_viewer(model: Any, data: Any) -> Any:
        size = model.vis.global_
        return viewer_class(model, data, width=size.offwidth, height=size.offheight)

    underlying.OffScreenViewer = sized_viewer

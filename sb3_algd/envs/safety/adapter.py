"""Adapter for safety-gymnasium 1.0.0, which does not work with current versions of Gymnasium, MuJoCo and NumPy.

The release pins old versions, so it is installed with ``pip install --no-deps`` and then fails to import. :func:`load`
patches it at run time, once per process. The files of the package are not changed:

===============================================  ======================================================================
problem                                          patch
===============================================  ======================================================================
the package's ``__init__`` imports vector        the package is put into ``sys.modules`` without running its
environments and wrappers that use modules       ``__init__``; the failing parts are not needed, and the other
removed in Gymnasium 1.x                         sub-modules import as usual
arrays as defaults in dataclasses, refused       the arrays of the colour table become hashable
by Python >= 3.11
``model.jnt(array([3]))``, refused by            an agent looks up its joint sensors in a proxy of the model that
MuJoCo >= 3                                      accepts such an index
``float(array([0.5]))``, refused by              the agents' module gets a ``float`` that accepts such an array
NumPy >= 2.4
a viewer without width and height, refused       the viewer gets the size set in the model
by Gymnasium 1.x
===============================================  ======================================================================

A ``safety_gymnasium`` that imports without help, such as a later release or the pinned stack, is used without changes.
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
    """A hashable array. Dataclasses refuse default values that cannot be hashed."""

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(self.tobytes())


class ScalarIndexModel:
    """
    A proxy of a MuJoCo model whose ``jnt`` also accepts an array of one element as index.

    :param model: The ``mujoco.MjModel``.
    """

    def __init__(self, model: Any) -> None:
        self._model = model

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def jnt(self, index: Any) -> Any:
        """
        :param index: The index of the joint, an int or an array of one element.
        :return: The named view of the joint.
        """
        return self._model.jnt(int(scalar(index)))


def scalar(value: Any) -> float:
    """
    :param value: A number, or an array of one element of any shape.
    :return: The value as a Python number.
    """
    return np.asarray(value).item()


def load() -> ModuleType:
    """
    Make ``safety_gymnasium`` importable. Later calls return the same module.

    :return: The package. If :func:`is_adapted`, its ``__init__`` has not run, and only its sub-modules can be used.
    :raises ImportError: If the package or one of its dependencies is missing. The message has the install command.
    """
    if PACKAGE in sys.modules:
        return sys.modules[PACKAGE]
    if importlib.util.find_spec(PACKAGE) is None:
        raise ImportError(f"This environment needs the package safety-gymnasium, which is not installed: {INSTALL_COMMAND}")
    try:
        return import_genuine()
    except Exception:  # noqa: BLE001  Any failure of the import means that the package needs the adapter.
        forget()
    try:
        return import_adapted()
    except ImportError as error:
        forget()
        raise ImportError(
            f"safety-gymnasium is installed, but something that it needs is not ({error}): {INSTALL_COMMAND}"
        ) from error


def is_adapted() -> bool:
    """:return: Whether the loaded package was patched by this module."""
    return getattr(sys.modules.get(PACKAGE), "adapted_by", None) == __name__


def import_genuine() -> ModuleType:
    """
    Import the package without patches.

    :return: The package.
    """
    ours = dict(gym.registry)
    package = importlib.import_module(PACKAGE)
    # The import registers the package's own environments under our ids. Their `step` returns six values, which Gymnasium
    # cannot use, and `gymnasium.make` is in the middle of making one of ours.
    gym.registry.update(ours)
    return package


def forget() -> None:
    """Remove the modules of a failed import, so that the next attempt starts from scratch."""
    for name in [name for name in sys.modules if name == PACKAGE or name.startswith(PACKAGE + ".")]:
        del sys.modules[name]


def import_adapted() -> ModuleType:
    """
    Import the package without its ``__init__`` and with the patches listed above.

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
    """
    Let agents read arrays of one element as numbers.

    :param base_agent: The package's module ``base_agent``.
    """
    base_agent.float = scalar
    look_up_sensors = base_agent.BaseAgent._init_jnt_sensors

    def look_up_sensors_by_int(agent: Any) -> None:
        engine = agent.engine
        agent.engine = base_agent.Engine(ScalarIndexModel(engine.model), engine.data)
        look_up_sensors(agent)
        agent.engine = engine

    base_agent.BaseAgent._init_jnt_sensors = look_up_sensors_by_int


def repair_viewer(underlying: Any) -> None:
    """
    Give every viewer a width and height.

    :param underlying: The package's module ``underlying``.
    """
    viewer_class = underlying.OffScreenViewer

    def sized_viewer(model: Any, data: Any) -> Any:
        size = model.vis.global_
        return viewer_class(model, data, width=size.offwidth, height=size.offheight)

    underlying.OffScreenViewer = sized_viewer

"""
Run the tests of Stable-Baselines3 with ALGD or SACLag in the place of SAC, and count them.

    pip download --no-deps --no-binary :all: stable-baselines3==2.9.2
    tar xf stable_baselines3-2.9.2.tar.gz
    python -m benchmarks.sb3_suite stable_baselines3-2.9.2/tests
    python -m benchmarks.sb3_suite stable_baselines3-2.9.2/tests --algorithm sac_lag -n 2 -k save_load

Every test in which SAC takes part applies, but for those listed in ``NOT_APPLICABLE``; tests of other algorithms and of parts
without an algorithm are left out. The tests must be those of the installed version. Arguments after the folder go to pytest.
"""

import inspect
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import CodeType
from typing import Any

import pytest
import stable_baselines3
from stable_baselines3.common.base_class import BaseAlgorithm

from sb3_algd import ALGD, SACLag
from sb3_algd.common.constrained_off_policy_algorithm import ConstrainedOffPolicyAlgorithm

ALGORITHMS: dict[str, type[ConstrainedOffPolicyAlgorithm]] = {"algd": ALGD, "sac_lag": SACLag}
#: What only SAC has, dropped by the substitute
SAC_ONLY = {
    "algd": ("ent_coef", "target_entropy", "use_sde", "sde_sample_freq", "use_sde_at_warmup"),
    "sac_lag": ("use_sde", "sde_sample_freq", "use_sde_at_warmup"),
}

#: Tests that cannot apply, by name without parameters
NOT_APPLICABLE = {
    "algd": {"test_save_load_pytorch_var": "tests SAC's entropy coefficient; ALGD has none"},
    "sac_lag": {},
}
OTHER_BUFFER = "asks for SB3's own buffer class; its twin here stores costs"
GSDE = "tests gSDE, which both algorithms refuse"


def no_cost(info: dict[str, Any]) -> float:
    """:param info: Of a step in one of SB3's test environments. :return: 0, they know no costs."""
    return 0.0


def make_substitute(name: str) -> type[ConstrainedOffPolicyAlgorithm]:
    """
    :param name: A key of ``ALGORITHMS``.
    :return: The algorithm with SAC's signature, and with what SB3's test environments do not declare: costs, limit, horizon.
    """

    class SubstituteForSAC(ALGORITHMS[name]):  # type: ignore[misc, valid-type]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            kwargs = {key: value for key, value in kwargs.items() if key not in SAC_ONLY[name]}
            super().__init__(*args, **{"cost_limit": 25.0, "episode_length": 1000, "cost_key": no_cost, **kwargs})

        def learn(self, *args: Any, **kwargs: Any) -> "SubstituteForSAC":
            # Into the folder of SAC
            return super().learn(*args, **{"tb_log_name": "SAC", **kwargs})

    return SubstituteForSAC


def names_in(code: CodeType) -> Iterator[str]:
    """:param code: Of a function. :return: All names that it uses, those of functions inside it too."""
    yield from code.co_names
    for constant in code.co_consts:
        if inspect.iscode(constant):
            yield from names_in(constant)


def takes_part(item: pytest.Function) -> bool:
    """:param item: A test. :return: Whether SAC takes part in it: as a parameter, or by name in a test without algorithms."""
    parameters = list(item.callspec.params.values()) if hasattr(item, "callspec") else []
    algorithms = [value for value in parameters if inspect.isclass(value) and issubclass(value, BaseAlgorithm)]
    if algorithms:
        return stable_baselines3.SAC in algorithms
    named = [value for value in parameters if isinstance(value, str)]
    return "sac" in named or "SAC" in names_in(item.function.__code__)


def reason_against(item: pytest.Function, algorithm: str) -> str | None:
    """
    :param item: A test with SAC.
    :param algorithm: What is in the place of SAC, a key of ``ALGORITHMS``.
    :return: Why the test does not apply, None if it does.
    """
    if item.path.stem == "test_sde" or (hasattr(item, "callspec") and item.callspec.params.get("use_sde")):
        return GSDE
    if item.originalname == "test_n_steps_warns_with_custom_replay_buffer_class":
        return OTHER_BUFFER
    return NOT_APPLICABLE[algorithm].get(item.originalname)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Let the user choose the algorithm."""
    parser.addoption("--algorithm", choices=list(ALGORITHMS), default="algd", help="what takes the place of SAC")


def pytest_configure(config: pytest.Config) -> None:
    """Put the substitute where the test modules import SAC from."""
    stable_baselines3.SAC = make_substitute(config.getoption("--algorithm"))  # type: ignore[misc, assignment]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep the tests with SAC, and mark those that do not apply."""
    kept = [item for item in items if isinstance(item, pytest.Function) and takes_part(item)]
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = kept
    for item in kept:
        reason = reason_against(item, config.getoption("--algorithm"))
        if reason is not None:
            item.add_marker(pytest.mark.skip(reason=reason))


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Print the counts."""
    stats = terminalreporter.stats
    passed, failed = len(stats.get("passed", [])), len(stats.get("failed", [])) + len(stats.get("error", []))
    reasons = Counter(report.longrepr[2].removeprefix("Skipped: ") for report in stats.get("skipped", []))
    terminalreporter.section(f"Stable-Baselines3's tests with {config.getoption('--algorithm')} as SAC")
    terminalreporter.write_line(f"{passed + failed} apply: {passed} pass, {failed} fail")
    terminalreporter.write_line(f"{sum(reasons.values())} do not apply:")
    for reason, count in reasons.most_common():
        terminalreporter.write_line(f"  {count:3d}  {reason}")


def main(arguments: list[str]) -> int:
    """:param arguments: The folder of tests, then what goes to pytest. :return: Exit code of pytest."""
    if not arguments or not Path(arguments[0]).is_dir():
        raise SystemExit(f"{__doc__}\nFirst argument: the tests of Stable-Baselines3 {stable_baselines3.__version__}.")
    folder, *others = arguments
    # Others need not even be imported: some ask for packages that the algorithms do not
    files = [str(path) for path in sorted(Path(folder).glob("test_*.py")) if "SAC" in path.read_text(encoding="utf-8")]
    # The plugin by its name, because the worker processes of pytest-xdist have to load it too
    return pytest.main([*files, "--rootdir", folder, "-p", "benchmarks.sb3_suite", "-o", "addopts=", "-q", *others])


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))

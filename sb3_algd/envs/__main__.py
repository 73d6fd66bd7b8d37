"""``python -m sb3_algd.envs``: list the ids with their limits, sizes and episode lengths."""

import argparse
import warnings

import gymnasium as gym

from sb3_algd.envs import register_envs
from sb3_algd.envs.catalogue import ACCELERATED, SPEED, STOCK, Entry, entries

SAFETY = 'pip install "sb3_algd[safety]"'
#: What to install for the environments of a track that cannot be made
NEEDS = {
    STOCK: f"the stock and accelerated tasks need: {SAFETY} && pip install --no-deps safety-gymnasium==1.0.0",
    SPEED: f"the speed tasks need: {SAFETY}",
}
NEEDS[ACCELERATED] = NEEDS[STOCK]
COLUMNS = ("id", "track", "cost limit", "discounted", "observation", "action", "steps")


def row(entry: Entry) -> tuple[str, ...]:
    """
    :param entry: An entry of the catalogue. The environment is made once to read its limit and spaces.
    :return: The cells of its row, in the order of :data:`COLUMNS`.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        env = gym.make(entry.id)
    limit, discounted = env.get_wrapper_attr("cost_limit"), env.get_wrapper_attr("cost_limit_discounted")
    sizes = [" x ".join(map(str, space.shape or ("?",))) for space in (env.observation_space, env.action_space)]
    env.close()
    return entry.id, entry.track, f"{limit:g}", "yes" if discounted else "no", *sizes, str(entry.episode_steps)


def main() -> None:
    """Print the list. If the package of an environment is missing, its cells show "-" and what to install follows below."""
    parser = argparse.ArgumentParser(prog="sb3-algd envs", description="List the environments and their limits.")
    parser.add_argument("pattern", nargs="?", default="", help="list only ids that contain this")
    parser.add_argument("--markdown", action="store_true", help="print a Markdown table")
    options = parser.parse_args()

    register_envs()
    chosen = [entry for entry in entries() if options.pattern in entry.id]
    if not chosen:
        parser.error(f"no id contains {options.pattern!r}; leave it out to list all")
    rows: list[tuple[str, ...]] = []
    problems: dict[str, None] = {}
    for entry in chosen:
        try:
            rows.append(row(entry))
        except (ImportError, gym.error.DependencyNotInstalled) as error:
            problems[NEEDS.get(entry.track, str(error))] = None
            rows.append((entry.id, entry.track, *["-"] * 4, str(entry.episode_steps)))
    print_table(rows, options.markdown)
    for problem in problems:
        print(f"\n-: {problem}")


def print_table(rows: list[tuple[str, ...]], markdown: bool) -> None:
    """
    :param rows: The rows below :data:`COLUMNS`.
    :param markdown: Whether to print a Markdown table.
    """
    table = [COLUMNS, *rows]
    if markdown:
        table.insert(1, tuple("---" for _ in COLUMNS))
        print("\n".join("| " + " | ".join(line) + " |" for line in table))
        return
    widths = [max(len(line[i]) for line in table) for i in range(len(COLUMNS))]
    for line in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


if __name__ == "__main__":
    main()

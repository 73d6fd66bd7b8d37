"""
The Zoo's ``plot_from_file``: draw what ``all_plots -o`` has saved.

    python -m sb3_algd.zoo.plot_from_file -i results.pkl
"""

from rl_zoo3.plots import plot_from_file

import sb3_algd.zoo  # noqa: F401  registers ALGD

if __name__ == "__main__":
    plot_from_file()

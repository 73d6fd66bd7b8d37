"""The tables of docs/performance.md, from what ``benchmarks.speed`` has measured."""

from pathlib import Path

import pandas as pd  # type: ignore[import-untyped]

from benchmarks.plot import table

#: What a measurement is known by
KEYS = ["device", "threads", "waiting", "part", "what", "variant", "round"]
SAC, COMPILED_SAC = "sac", ("sac-compiled", "sac-compiled-bf16")
#: The model of the table of growth
GROWING = "ve-compiled-bf16"
#: Models of the table of threads
WAITING = ("sac", "ve", "ve-compiled-bf16")
UPDATES = (
    "| what | per second | share of SAC's (least to most) | of compiled SAC's | not active: share | `policy_delay=1`: share |"
)
ACTING = "| threads | observations | SAC, calls per second | VE, share (least to most) | DDPM, share (least to most) |"
GROWTH = "| setting | ms per update | ratio to standard | GFLOP | floor, ms | time / floor |"
FLOOR = "| threads | precision | GFLOP/s of the critics' products | floor, ms | compiled update, ms | time / floor |"
THREADS = "| what | 1 thread | 2 threads | 2 threads, `OMP_WAIT_POLICY=PASSIVE` |"


def row(*cells: object) -> str:
    """:param cells: What is in a row. :return: The row, in Markdown."""
    return f"| {' | '.join(map(str, cells))} |"


class Medians:
    """
    What was measured at one place.

    :param measured: Lines of the CSV of one device, number of threads and policy of waiting.
    """

    def __init__(self, measured: pd.DataFrame) -> None:
        self._rates = measured.pivot_table(index="round", columns=["part", "what", "variant"], values="value")
        # As measured, not by their names
        self._keys = list(measured[["part", "what", "variant"]].drop_duplicates().itertuples(index=False, name=None))

    def has(self, *key: str) -> bool:
        """:param key: Part, what and variant. :return: Whether it was measured."""
        return key in self._keys

    def median(self, *key: str) -> float:
        """:param key: Part, what and variant. :return: Median over the rounds, NaN if it was not measured."""
        return float(self._rates[key].median()) if self.has(*key) else float("nan")

    def number(self, *key: str) -> str:
        """:param key: Part, what and variant. :return: Median over the rounds, as it is printed."""
        value = self.median(*key)
        return "" if pd.isna(value) else f"{value:,.0f}" if value >= 100 else f"{value:.3g}"

    def share(self, key: tuple[str, str, str], reference: tuple[str, str, str], extremes: bool = False) -> str:
        """
        :param key: Part, what and variant.
        :param reference: The same of what it is divided by.
        :param extremes: Whether least and most follow in brackets.
        :return: Median over the rounds of the ratio within a round.
        """
        if not (self.has(*key) and self.has(*reference)):
            return ""
        ratios = self._rates[key] / self._rates[reference]
        return f"{ratios.median():.2f}" + (f" ({ratios.min():.2f} to {ratios.max():.2f})" if extremes else "")

    def names(self, part: str, what: str | None = None) -> list[str]:
        """:param part: Part. :param what: Model. :return: Models of the part, or variants of the model, as measured."""
        keys = [key for key in self._keys if key[0] == part and what in (None, key[1])]
        return list(dict.fromkeys(key[1 if what is None else 2] for key in keys))


def updates_table(place: Medians) -> str:
    """:param place: What was measured there. :return: The table of updates."""
    compiled = max(COMPILED_SAC, key=lambda name: place.median("updates", name, "default"))
    rows = []
    for what in place.names("updates"):
        if what == "products":
            continue
        shares = [
            place.share(("updates", what, variant), ("updates", reference, "default"), extremes)
            for variant, reference, extremes in (
                ("default", SAC, True),
                ("default", compiled, False),
                ("inactive", SAC, False),
                ("delay 1", SAC, False),
            )
        ]
        rows.append(row(what, place.number("updates", what, "default"), *shares))
    return table(UPDATES, rows)


def acting_rows(place: Medians, threads: int) -> list[str]:
    """:param place: What was measured there. :param threads: With so many threads. :return: Rows of the table of acting."""
    rows = []
    for n in sorted(place.names("acting", SAC), key=int):
        shares = [place.share(("acting", kind, n), ("acting", SAC, n), True) for kind in ("ve", "ddpm")]
        rows.append(row(threads, n, place.number("acting", SAC, n), *shares))
    return rows


def growth_table(place: Medians) -> str:
    """:param place: What was measured there. :return: The table of how an update grows."""
    products = place.median("updates", "products", "bfloat16")
    standard = place.median("growth", GROWING, "standard")
    rows = []
    for setting in place.names("growth", GROWING):
        rate, operations = place.median("growth", GROWING, setting), place.median("GFLOP", GROWING, setting)
        cells = 1e3 / rate, standard / rate, operations, 1e3 * operations / products, products / (rate * operations)
        rows.append(row(setting, *(f"{cell:.3g}" for cell in cells)))
    return table(GROWTH, rows)


def floor_rows(place: Medians, threads: int, operations: float) -> list[str]:
    """
    :param place: What was measured there.
    :param threads: With so many threads.
    :param operations: GFLOP of an update.
    :return: Rows of the table of the floor that matrix products set.
    """
    rows = []
    for precision, what in (("float32", "ve-compiled"), ("bfloat16", "ve-compiled-bf16")):
        products, rate = place.median("updates", "products", precision), place.median("updates", what, "default")
        cells = products, 1e3 * operations / products, 1e3 / rate, products / (rate * operations)
        rows.append(row(threads, precision, *(f"{cell:.3g}" for cell in cells)))
    return rows


def make_tables(folder: Path) -> dict[str, str]:
    """
    :param folder: Where ``benchmarks.speed`` has left its measurements.
    :return: Markdown tables, by their headings; those of a GPU have its name in them.
    """
    measured = pd.read_csv(folder / "measurements.csv", dtype={"variant": str})
    tables = {}
    for device, of_device in measured.groupby("device"):
        ending = "" if device == "cpu" else f", {device}"
        places = {key: Medians(lines) for key, lines in of_device.groupby(["threads", "waiting"])}
        active = {threads: place for (threads, waiting), place in places.items() if waiting == "default"}
        acting: list[str] = []
        floor: list[str] = []
        first = active.get(1)
        operations = first.median("GFLOP", GROWING, "standard") if first else float("nan")
        for threads, place in active.items():
            tables[f"updates, {threads} thread{'s' * (threads > 1)}{ending}"] = updates_table(place)
            acting += acting_rows(place, threads)
            floor += floor_rows(place, threads, operations)
        tables[f"acting{ending}"] = table(ACTING, acting)
        tables[f"floor{ending}"] = table(FLOOR, floor)
        if first:
            tables[f"growth{ending}"] = growth_table(first)
        columns = [places[key] for key in ((1, "default"), (2, "default"), (2, "passive")) if key in places]
        if len(columns) == 3:
            rows = [row(what, *(place.number("updates", what, "default") for place in columns)) for what in WAITING]
            tables[f"threads{ending}"] = table(THREADS, rows)
    machine = pd.read_csv(folder / "machine.csv")
    tables["machine"] = table("| machine | |", [row(*fact) for fact in machine.itertuples(index=False)])
    return tables

"""How unequal the classes of a run are: its rarest class, by the test texts."""

from finetuning.comparison.collected import Run

UNEQUAL = 0.5  # of an even share: a class is rare if it has less


def has_rare_class(run: Run) -> bool:
    """Whether the rarest class has less than ``UNEQUAL`` of an even share of the test texts, each with one label."""
    classes = run.get("test", "per_class")
    return bool(classes) and run.get("test", "exact_match") is None and rarest_share(run) * len(classes) < UNEQUAL


def rarest_share(run: Run) -> float:
    """The share of the rarest class in the test texts."""
    return run.get("test", "per_class", rarest(run), "support") / run.get("test", "examples")


def rarest(run: Run) -> str:
    """The name of the class with the fewest test texts, of those that have any."""
    classes = {name: scores for name, scores in run.get("test", "per_class").items() if scores["support"]}
    return min(classes, key=lambda name: (classes[name]["support"], name))

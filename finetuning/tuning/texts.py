"""What a search prints about its trials."""

from datetime import timedelta

from finetuning.tuning.plan import Budget, Plan
from finetuning.tuning.trials import OUT_OF_TIME, PRUNED, Trial, Trials, best_of


def trial_name(number: int) -> str:
    """A trial, for people."""
    return "the default" if number == 0 else f"trial {number}"


def shown_values(trial: Trial, plan: Plan) -> dict[str, str]:
    """What a trial tries, by parameter; what a parameter multiplies is shown as the flag has it."""
    point = trial.point or {}
    settings = plan.space.settings(point)
    values = {name: settings.get(name, value) for name, value in point.items()}
    return {name: f"{value:g}" if isinstance(value, float) else str(value) for name, value in values.items()}


def limits_text(budget: Budget) -> str:
    """What limits a search, as the end of a line."""
    trials = "" if budget.trials is None else f" of {budget.trials}"
    left = "" if budget.minutes is None else f"; {timedelta(seconds=max(0, round(budget.left)))} left"
    return trials + left


def progress_line(trial: Trial, trials: Trials, plan: Plan, budget: Budget) -> str:
    """How a trial ended, how many have, the best score until now, and the time left."""
    everything = trials.all()
    shown = "" if trial.latest is None else f" {plan.monitor} {trial.latest:.4f}"
    values = ", ".join(f"{name} {value}" for name, value in shown_values(trial, plan).items())
    why = trial.error or ("the time left is for the last runs" if trial.state == OUT_OF_TIME else "")
    reason = f" ({why})" if why else ""
    name = f"trial {trial.number}{', the default,' if trial.number == 0 else ''}"
    after = f" after epoch {max(trial.history)}," if trial.state == PRUNED and trial.history else ""
    best = best_of(everything, plan.minimize)
    top = f"; best {best.value:.4f}, trial {best.number}" if best is not None else ""
    done = sum(other.state is not None for other in everything)
    return f"{name} {trial.state}{after}{reason}{shown}: {values}{top}; {done} ended{limits_text(budget)}"

"""What a plan does, what it costs, and what its controls do at the same cost.

Every arm is one plan, or several draws of one. Each draw is calibrated for either sign by itself to one KL budget on the same
neutral tokens (`calibration`), then scored on held-out items: the effect is the score steered towards minus the score
steered away. Intervals are bootstraps over items, with Student's t for what several draws differ by; arms are compared on the
same items.

The mean effect over random draws is zero by symmetry, so the arms in `NULLS` are told by the 95th percentile of |effect| over
draws. Other arms of several draws (untrained experts of several seeds) are told by their mean.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..files import library_versions, whole_file

if TYPE_CHECKING:
    from ..steering.plan import SteeringPlan

NULLS = ("permuted", "random")
CONFIDENCE = 0.95
_RESAMPLES = 2000


@dataclass(frozen=True, eq=False)
class Receipt:
    """Measured arms; print it for the table.

    Attributes:
        arms: by name, plain numbers. `effect` with `interval` (95 %, bootstrap over `n` items, with what `draws` differ by; of an
            arm in `NULLS` the 95th percentile of |effect| over draws, without one), `effects` of all draws, `items` (each item's
            effect; of several draws their mean), `score_plus` and `score_minus`, `agrees` (shares of the items whose score is
            above 0, which is the positive side, steered towards and away), `wrong_way` (share of items that move the wrong way),
            `strength_plus`, `strength_minus` (total over layers, in residual norms), `kl_p95` (nats, the larger of both signs),
            `nll` (nats a token, mean of both signs), `budget_met`, `layers`. Of several draws: medians.
        unsteered: `score`, `nll` and `agrees` without steering.
        kl_budget: nats, at which the arms were compared; less than asked where some arm could not reach that.
        unit: of effects.
        shares: ratios to native, as (value, low, high): `expert`, and `beyond_untrained`, that is (expert - untrained) / native,
            whose interval counts what the seeds differ by. Empty, with a note, where native does no more than random directions.
        doses: effect at several doses, by arm: lists of (dose, effect, low, high).
        rollouts: by arm and sign: `kl_p95` along the steered continuations, `repetition`, `distinct`, and the texts.
        notes: what a reader has to know, such as labelled texts among the anchors.
        neutral: how many neutral `prompts` and `tokens`, and the `rollout` in tokens.
        tested: the tested plan with this receipt in its `info` (see `plan`); None where no single plan was tested.
    """

    arms: Mapping[str, Mapping[str, Any]]
    unsteered: Mapping[str, float]
    kl_budget: float
    unit: str
    shares: Mapping[str, Sequence[float]] = field(default_factory=dict)
    doses: Mapping[str, Sequence[Sequence[float]]] = field(default_factory=dict)
    rollouts: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    notes: Sequence[str] = ()
    neutral: Mapping[str, int] = field(default_factory=dict)
    tested: SteeringPlan | None = None

    @property
    def plan(self) -> SteeringPlan:
        """The tested plan with this receipt in its `info`, so that printing and saving it tell what was measured.

        Raises:
            ValueError: no single plan was tested, or the receipt was read from a file.
        """
        if self.tested is None:
            raise ValueError("This receipt holds no plan: only one that receipt(plan, ...) returned does.")
        return self.tested

    # -- what it says ------------------------------------------------------------------------------------------------

    @property
    def contributed(self) -> bool | None:
        """Whether the expert contributed to the arm `expert`; None where no untrained control was measured.

        It did if the effect is above zero; above what one further untrained expert in forty would reach, as far as the seeds
        tell (`bar`), and the best of them by more than the half-width of the expert's interval; above that of text features
        (paired); and above what one random or permuted draw in a hundred would reach (normal around zero, as wide as the
        draws). A plan that is itself an untrained expert's passes at most once in twenty times if effects of seeds are normal,
        wherever their mean is; with random and permuted arms that do as much, about once in a hundred times.
        """
        if "expert" not in self.arms or "untrained" not in self.arms:
            return None
        return float(self.arms["expert"]["interval"][0]) > 0 and self.arms["expert"]["effect"] > self.bar

    @property
    def bar(self) -> float:
        """The effect that `contributed` asks for, in `unit`; of a receipt with the arms `expert` and `untrained`.

        Two seeds or three tell little of how far a further one would come, so the lower of two bounds is taken, each of which one
        in forty exceeds: Student's around the seeds' mean, and around zero with their root mean square, for seeds that
        scatter around zero as random directions do. More seeds lower it.
        """
        return max(self._levels().values())

    def _levels(self) -> dict[str, float]:
        """What each control could reach by chance; the highest is the bar."""
        from scipy.stats import t

        expert, seeds = self.arms["expert"], self.arms["untrained"]["effects"]
        levels = {"no plan": 0.0}
        for name in NULLS:
            if name in self.arms:
                draws = np.array(self.arms[name]["effects"])
                levels[name] = float(t.ppf(0.99, len(draws)) * np.sqrt((draws**2).mean()))
        paired = ["text_features"] if len(seeds) > 1 else ["text_features", "untrained"]
        for name in paired:
            if name in self.arms:
                _, low, _ = interval(np.array(expert["items"]) - np.array(self.arms[name]["items"]))
                levels[name] = expert["effect"] - low
        if len(seeds) > 1:
            n, sure = len(seeds), (1 + CONFIDENCE) / 2
            around_mean = statistics.fmean(seeds) + t.ppf(sure, n - 1) * statistics.stdev(seeds) * math.sqrt(1 + 1 / n)
            around_zero = t.ppf(sure, n) * math.sqrt(statistics.fmean(x * x for x in seeds))
            beside = max(seeds) + expert["effect"] - expert["interval"][0]
            levels[f"untrained, of {n} seeds,"] = max(float(min(around_mean, around_zero)), beside)
        return levels

    @property
    def verdict(self) -> str:
        """In a sentence or two, what the expert contributed."""
        if "expert" not in self.arms:
            return "no arm is called expert, so nothing is said of one."
        expert = self.arms["expert"]
        told = f"effect {_number(expert)} {self.unit} (n = {expert['n']}, KL p95 {expert['kl_p95']:.2f})"
        if "expert" in self.shares:
            told += f", {_share(self.shares['expert'])} of native"
        if self.contributed is None:
            unknown = "no untrained expert was measured, so it does not say what the expert contributed"
            return "; ".join([told, unknown, *self.notes]) + "."
        beyond = expert["effect"] - self.arms["untrained"]["effect"]
        share = f", {_share(self.shares['beyond_untrained'])} of native" if "beyond_untrained" in self.shares else ""
        if self.contributed:
            said = f"the expert contributed {beyond:.3g} of it beyond an untrained one{share}"
        else:
            name, bar = max(self._levels().items(), key=lambda level: level[1])
            said = f"the expert contributed nothing that its controls do not reach (by chance, {name} could reach {bar:.3g})"
        return "; ".join([told, said, *self.notes]) + "."

    # -- files -------------------------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        kept = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "tested"}
        kept["arms"] = {name: dict(arm) for name, arm in self.arms.items()}
        return {"verdict": self.verdict, **kept, "notes": list(self.notes), "versions": library_versions()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Receipt:
        """What `to_dict` gave, such as `plan.info["receipt"]`.

        Raises:
            KeyError: the values are no receipt's.
        """
        return cls(**{f.name: values[f.name] for f in fields(cls) if f.name != "tested"})

    def save(self, path: str | Path) -> Path:
        """Writes JSON; the file appears whole or not at all."""
        return whole_file(path, lambda to: to.write_text(json.dumps(self.to_dict(), indent=1)))

    @classmethod
    def load(cls, path: str | Path) -> Receipt:
        """Reads what `save` wrote."""
        return cls.from_dict(json.loads(Path(path).read_text()))

    def __repr__(self) -> str:
        lines = [
            f"{'arm':<20}{'layers':<18}{'n':>4}{'effect':>9}  {'95 % interval':<16}{'wrong way':>9}{'KL p95':>8}{'NLL':>7}",
            f"{'unsteered':<20}{'':<18}{'':>4}{'':>9}  {'':<16}{'':>9}{'':>8}{self.unsteered['nll']:>7.2f}",
        ]
        for name, a in self.arms.items():
            layers = " ".join(f"{e}>{t}" if e is not None else str(t) for e, t in a["layers"][:3])
            layers += " .." if len(a["layers"]) > 3 else ""
            between = "" if a["interval"] is None else f"{a['interval'][0]:.3g} to {a['interval'][1]:.3g}"
            note = ""
            if name in NULLS:
                note = f"  95th percentile of |effect|, {a['draws']} draws"
            elif a["draws"] > 1:
                note = f"  mean of {a['draws']}: {', '.join(f'{e:.3g}' for e in a['effects'])}"
            kl = f"{a['kl_p95']:.2f}" if a["kl_p95"] is not None else ""
            nll = f"{a['nll']:.2f}" if a["nll"] is not None else ""
            lines.append(
                f"{name:<20}{layers:<18}{a['n']:>4}{a['effect']:>9.3g}  {between:<16}{a['wrong_way']:>9.0%}{kl:>8}{nll:>7}"
                + note
            )
        for name, r in self.rollouts.items():
            kl = f", KL p95 {r['kl_p95']:.2f}" if r.get("kl_p95") is not None else ""
            lines.append(f"rollouts {name}: repetition {r['repetition']:.2f}, distinct {r['distinct']:.2f}{kl}")
        lines.append(f"Effects in {self.unit}, at KL p95 = {self.kl_budget:.2f} nats.")
        if "expert" in self.arms and "agrees" in self.unsteered:
            up, down = (f"{share:.0%}" for share in self.arms["expert"]["agrees"])
            before = f"{self.unsteered['agrees']:.0%}"
            lines.append(f"Items on the positive side: {before} unsteered, {up} steered towards, {down} away.")
        return "\n".join([*lines, self.verdict[0].upper() + self.verdict[1:]])

    def plot(self, ax: Any = None) -> Any:
        """Effect with its interval against cost, a point an arm; a matplotlib figure.

        Raises:
            ImportError: matplotlib is not installed.
        """
        from ..plotting import plot_receipt

        return plot_receipt(self, ax)

    def plot_doses(self, ax: Any = None) -> Any:
        """Effect against dose, with intervals; a matplotlib figure.

        Raises:
            ValueError: no doses were measured.
        """
        from ..plotting import plot_doses

        return plot_doses(self, ax)


def _number(arm: Mapping[str, Any]) -> str:
    between = "" if arm["interval"] is None else f" [{arm['interval'][0]:.3g}, {arm['interval'][1]:.3g}]"
    return f"{arm['effect']:.3g}{between}"


def _share(found: Sequence[float]) -> str:
    value, low, high = found
    return f"{value:.2f} [{low:.2f}, {high:.2f}]"


def interval(
    items: np.ndarray, statistic: Any = None, spread: float = 0.0, freedom: int = 0
) -> tuple[float, float, float]:
    """A statistic of the columns of `items` `[item]` or `[arm, item]` (their mean), with its percentile bootstrap interval.

    Args:
        items: what is drawn again.
        statistic: of the rows; their mean if None.
        spread: standard error of the statistic from something else than the items, such as the seeds of one arm.
        freedom: degrees of freedom of that standard error.
    """
    from scipy.stats import bootstrap

    rows = np.atleast_2d(items)
    made = statistic or (lambda x, axis=-1: x.mean(axis))
    value = float(made(*rows, axis=-1))
    if rows.shape[1] < 2 or np.ptp(rows) == 0:
        return value, value, value
    found = bootstrap(
        tuple(rows), made, paired=True, vectorized=True, n_resamples=_RESAMPLES, confidence_level=CONFIDENCE,
        method="percentile", rng=np.random.default_rng(0),
    )  # fmt: skip
    samples = found.bootstrap_distribution
    if spread:
        samples = samples + spread * np.random.default_rng(1).standard_t(freedom, len(samples))
    low, high = np.quantile(samples, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return value, float(low), float(high)

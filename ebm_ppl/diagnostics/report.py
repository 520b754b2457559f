"""A diagnosis: checks, two verdicts, and how they are shown."""

import dataclasses
import html
import textwrap

import xarray as xr

from ebm_ppl.diagnostics.check import Check, Status, verdict
from ebm_ppl.errors import DiagnosisFailure

_COLOURS = {"pass": "#1a7f37", "warn": "#9a6700", "fail": "#cf222e", "not assessable": "#57606a"}
_TITLES = {"sampler": "Of the sampler", "smc": "Of the SMC that judges the model", "model": "Of the model"}
_WIDTH = 120


@dataclasses.dataclass(frozen=True)
class Diagnosis:
    """What :func:`ebm_ppl.diagnostics.diagnose` found; prints as a table, and renders as HTML in notebooks.

    Attributes:
        checks: All checks, in the order they were made.
        tree: The draws behind them, an ArviZ ``DataTree``: ``negative_phase`` (the given chains, continued),
            ``superchains``, ``smc``, ``log_z``, each of the first two with its ``_stats``.
        num_gradients: Gradient evaluations that were spent.
        num_energies: Evaluations of the energy alone.
        budget: What there was to spend.

    Example:
        >>> import xarray as xr
        >>> from ebm_ppl.diagnostics import Check
        >>> good = Check("rhat", "pass", 1.0, "<= 1.01", "chains agree", "unseen modes", is_required=True)
        >>> found = Diagnosis((good,), xr.DataTree(), 1000, 0, 1000)
        >>> found.sampler, found.model, found["rhat"].value
        ('pass', 'not assessable', 1.0)
    """

    checks: tuple[Check, ...]
    tree: xr.DataTree
    num_gradients: int
    num_energies: int
    budget: int

    def __getitem__(self, name: str) -> Check:
        """One check by name."""
        for check in self.checks:
            if check.name == name:
                return check
        raise KeyError(f"{name!r}: expected one of {[check.name for check in self.checks]}.")

    @property
    def sampler(self) -> Status:
        """Whether the chains sample the model, at frozen parameters."""
        return verdict(check for check in self.checks if check.judges == "sampler")

    @property
    def model(self) -> Status:
        """Whether the model has the law of the data, as far as SMC tells; "not assessable" where SMC is not believed."""
        if any(check.judges == "smc" and check.status != "pass" for check in self.checks):
            return "not assessable"
        return verdict(check for check in self.checks if check.judges in ("model", "smc"))

    def raise_if_failed(self, *, strict: bool = False) -> None:
        """Raise where the sampler or the model fails.

        Args:
            strict: Also where one of the two is anything but passed.

        Raises:
            DiagnosisFailure: with the checks that failed, and why.
        """
        accepted = {"pass"} if strict else {"pass", "warn", "not assessable"}
        whom = [name for name in ("sampler", "model") if getattr(self, name) not in accepted]
        if not whom:
            return
        judged = {*whom, "smc"} if strict else set(whom)
        blamed = [
            c for c in self.checks if c.judges in judged and (c.status == "fail" or (strict and self._holds_up(c)))
        ]
        lines = "".join(f"\n  {check}" for check in blamed)
        what = " and ".join(f"{name}: {getattr(self, name)}" for name in whom)
        raise DiagnosisFailure(
            f"diagnose: {what}.{lines}\nExpected every required check to pass. Fix the sampler first: what judges the "
            "model is independent of it, but training with a sampler that does not mix gives a wrong model.",
            diagnosis=self,
            failed=tuple(check.name for check in blamed),
        )

    @staticmethod
    def _holds_up(check: Check) -> bool:
        return check.status == "warn" or (check.is_required and check.status != "pass")

    def _rows(self) -> list[tuple[str, ...]]:
        rows = []
        for check in self.checks:
            value = "" if check.value != check.value else f"{check.value:.3g}"
            name = check.name + ("*" if check.is_required else "")
            cost = f"; {check.num_gradients:,} gradients" if check.num_gradients else ""
            rows.append((name, check.judges, check.status, value, check.threshold + cost, check.why, check.blind_to))
        return rows

    @property
    def _cost(self) -> str:
        alone = f" and {self.num_energies:,} energies alone" if self.num_energies else ""
        return f"cost: {self.num_gradients:,} gradient evaluations{alone} (budget {self.budget:,})"

    def __str__(self) -> str:
        rows = self._rows()
        widths = [max(len(row[i]) for row in rows) if rows else 0 for i in (0, 2, 3)]
        indent = " " * (sum(widths) + 8)
        lines = [f"sampler: {self.sampler}", f"model:   {self.model}", self._cost]
        for judged, title in _TITLES.items():
            lines += ["", title] if any(row[1] == judged for row in rows) else []
            for name, who, status, value, threshold, why, blind_to in rows:
                if who != judged:
                    continue
                cells = zip((name, status, value), widths, strict=True)
                start = "  " + "  ".join(f"{cell:<{width}}" for cell, width in cells) + "  "
                held = f"[{threshold}] " if value or "gradients" in threshold else ""
                shown = f"{why}. {held}Blind to {blind_to}."
                lines += textwrap.wrap(shown, _WIDTH, initial_indent=start, subsequent_indent=indent)
        return "\n".join([*lines, "", "* required for a pass"])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        def badge(status: str) -> str:
            return f'<b style="color:{_COLOURS[status]}">{status}</b>'

        head = ("check", "judges", "status", "value", "threshold", "finding", "blind to")
        cells = "".join(f'<th style="text-align:left">{name}</th>' for name in head)
        body = []
        for row in self._rows():
            shown = [html.escape(cell) for cell in row]
            shown[2] = badge(row[2])
            left = "".join(f'<td style="text-align:left;vertical-align:top">{cell}</td>' for cell in shown)
            body.append(f"<tr>{left}</tr>")
        return (
            f"<div><p>sampler: {badge(self.sampler)} &emsp; model: {badge(self.model)}<br>{html.escape(self._cost)}</p>"
            # On a phone the table is pushed sideways, and not the page.
            f'<div style="overflow-x:auto"><table style="min-width:42em"><thead><tr>{cells}</tr></thead>'
            f"<tbody>{''.join(body)}</tbody></table></div>"
            "<p>* required for a pass</p></div>"
        )

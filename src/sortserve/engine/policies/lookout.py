"""How a policy looks at the present: with prices of machine time that it keeps from decision to decision."""

from sortserve.engine.policies.outlook import Outlook
from sortserve.engine.policies.prices import Prices
from sortserve.engine.policies.protocol import View

_RENEW_PRICES = 16  # decisions; the step cost is corrected while serving


class Lookout:
    """Makes the outlook of each decision. Keeps no requests. That step times are wrong is not its business: whoever
    measures steps corrects the step cost that it asks (`cost_model.py`)."""

    def __init__(self) -> None:
        self.decisions = 0
        self._prices: Prices | None = None

    def look(self, view: View) -> Outlook:
        """The outlook at this moment."""
        if self._prices is None or self.decisions % _RENEW_PRICES == 0:
            self._prices = Prices.of(view.cost, view.rungs, view.step_tokens)
        self.decisions += 1
        return Outlook(view, self._prices)

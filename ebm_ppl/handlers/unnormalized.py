"""A model without its unknown normalisers, for algorithms that account for log Z themselves."""

from typing import Any

from numpyro.primitives import Messenger

from ebm_ppl.distributions import find_ebms, map_ebms


class unnormalized(Messenger):
    """Run a model with log Z of every EBM left out where it is not given.

    Nothing is proved here: the caller holds everything that log Z depends on fixed, or cancels it.
    """

    def process_message(self, msg: dict[str, Any]) -> None:
        """Rewrite the EBMs of one sample site."""
        if msg["type"] == "sample" and find_ebms(msg["fn"]):
            msg["fn"] = map_ebms(
                lambda ebm: ebm.with_normalizer(0.0, "constant") if ebm.log_normalizer is None else ebm, msg["fn"]
            )

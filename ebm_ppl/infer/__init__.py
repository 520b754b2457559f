"""Posterior inference where log Z depends on what is inferred."""

from ebm_ppl.infer.doubling import DoublingRow as DoublingRow
from ebm_ppl.infer.doubling import InnerDoubling as InnerDoubling
from ebm_ppl.infer.doubling import inner_doubling_test as inner_doubling_test
from ebm_ppl.infer.exchange import Exchange as Exchange
from ebm_ppl.infer.exchange import ExchangeState as ExchangeState
from ebm_ppl.infer.latent_prior import LatentPriorState as LatentPriorState
from ebm_ppl.infer.latent_prior import fit_latent_prior as fit_latent_prior
from ebm_ppl.infer.surrogate import SurrogateNUTS as SurrogateNUTS

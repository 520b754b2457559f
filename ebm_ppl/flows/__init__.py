"""Normalizing flows: distributions to propose from, fitted to chains between the phases of a sampler."""

from ebm_ppl.flows.coupling import CouplingFlow as CouplingFlow
from ebm_ppl.flows.coupling import RealNVP as RealNVP
from ebm_ppl.flows.coupling import SplineCoupling as SplineCoupling
from ebm_ppl.flows.fitting import fit_flow as fit_flow
from ebm_ppl.flows.fitting import forward_kl as forward_kl
from ebm_ppl.flows.fitting import pretrain_flow as pretrain_flow
from ebm_ppl.flows.fitting import reverse_kl as reverse_kl
from ebm_ppl.flows.player import proposal_of as proposal_of
from ebm_ppl.flows.player import proposal_only as proposal_only
from ebm_ppl.flows.refit import Refit as Refit
from ebm_ppl.flows.refit import refit_flow as refit_flow

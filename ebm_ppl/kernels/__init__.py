"""Kernels: from a potential to an ``(init, step)`` pair on a population of chains."""

from ebm_ppl.kernels.mcmc import from_blackjax as from_blackjax
from ebm_ppl.kernels.mcmc import hmc as hmc
from ebm_ppl.kernels.mcmc import mala as mala
from ebm_ppl.kernels.mcmc import nuts as nuts
from ebm_ppl.kernels.mcmc import unadjusted_langevin as unadjusted_langevin

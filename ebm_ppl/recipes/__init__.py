"""Recipes: the training procedures of papers, each a thin assembly of the package's parts."""

from ebm_ppl.recipes.adaptive_flow import adaptive_flow as adaptive_flow
from ebm_ppl.recipes.dual_mcmc_teaching import dual_mcmc_teaching as dual_mcmc_teaching
from ebm_ppl.recipes.dual_mcmc_teaching import generator_of as generator_of
from ebm_ppl.recipes.dual_training import dual_training as dual_training
from ebm_ppl.recipes.generalized_contrastive_divergence import (
    generalized_contrastive_divergence as generalized_contrastive_divergence,
)
from ebm_ppl.recipes.generalized_contrastive_divergence import sampler_of as sampler_of
from ebm_ppl.recipes.generator_model import GeneratorModel as GeneratorModel
from ebm_ppl.recipes.generator_model import gaussian_generator as gaussian_generator
from ebm_ppl.recipes.short_run import short_run as short_run

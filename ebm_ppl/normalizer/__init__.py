"""Normalisers: log Z of an EBM with its error, by integration, by summation and by annealing."""

from ebm_ppl.normalizer.annealing import Particles as Particles
from ebm_ppl.normalizer.annealing import anneal as anneal
from ebm_ppl.normalizer.enumeration import enumerate_states as enumerate_states
from ebm_ppl.normalizer.enumeration import list_states as list_states
from ebm_ppl.normalizer.flow_importance import flow_importance as flow_importance
from ebm_ppl.normalizer.importance import annealed_importance as annealed_importance
from ebm_ppl.normalizer.importance import annealed_particles as annealed_particles
from ebm_ppl.normalizer.pareto import pareto_khat as pareto_khat
from ebm_ppl.normalizer.quadrature import quadrature as quadrature
from ebm_ppl.normalizer.result import LogNormalizer as LogNormalizer
from ebm_ppl.normalizer.tempered_smc import tempered_smc as tempered_smc

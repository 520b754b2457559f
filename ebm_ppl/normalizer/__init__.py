"""Normalisers: log Z of an EBM with its error, by integration, summation, annealing and from chains."""

from ebm_ppl.normalizer.annealing import Particles as Particles
from ebm_ppl.normalizer.annealing import anneal as anneal
from ebm_ppl.normalizer.bidirectional import LogNormalizerBounds as LogNormalizerBounds
from ebm_ppl.normalizer.bidirectional import bidirectional as bidirectional
from ebm_ppl.normalizer.bridge import bridge_sampling as bridge_sampling
from ebm_ppl.normalizer.confidence import lower_confidence_bound as lower_confidence_bound
from ebm_ppl.normalizer.data_likelihood import MeanLogLikelihood as MeanLogLikelihood
from ebm_ppl.normalizer.data_likelihood import compare_log_likelihoods as compare_log_likelihoods
from ebm_ppl.normalizer.data_likelihood import log_likelihood as log_likelihood
from ebm_ppl.normalizer.enumeration import enumerate_states as enumerate_states
from ebm_ppl.normalizer.enumeration import list_states as list_states
from ebm_ppl.normalizer.flow_importance import flow_importance as flow_importance
from ebm_ppl.normalizer.importance import annealed_importance as annealed_importance
from ebm_ppl.normalizer.importance import annealed_particles as annealed_particles
from ebm_ppl.normalizer.pareto import pareto_khat as pareto_khat
from ebm_ppl.normalizer.quadrature import quadrature as quadrature
from ebm_ppl.normalizer.result import LogNormalizer as LogNormalizer
from ebm_ppl.normalizer.reverse_importance import reverse_annealed_importance as reverse_annealed_importance
from ebm_ppl.normalizer.tempered_smc import tempered_particles as tempered_particles
from ebm_ppl.normalizer.tempered_smc import tempered_smc as tempered_smc
from ebm_ppl.normalizer.tracked import tracked as tracked

"""Training objectives: plain functions of a potential, a sampler state, a batch and a key."""

from ebm_ppl.objectives.contrastive import contrastive_divergence as contrastive_divergence
from ebm_ppl.objectives.contrastive import persistent_contrastive_divergence as persistent_contrastive_divergence
from ebm_ppl.objectives.stateless import stateless as stateless

"""Effect handlers that account for log Z of the EBM sites of a NumPyro model, and that simulate them."""

from ebm_ppl.handlers.constant import constant_normalizer as constant_normalizer
from ebm_ppl.handlers.estimated import estimated_normalizer as estimated_normalizer
from ebm_ppl.handlers.exact import exact_normalizer as exact_normalizer
from ebm_ppl.handlers.gradient import gradient_surrogate as gradient_surrogate
from ebm_ppl.handlers.negative_phase import negative_phase as negative_phase
from ebm_ppl.handlers.simulate import simulate as simulate
from ebm_ppl.handlers.surrogate import Pool as Pool
from ebm_ppl.handlers.surrogate import make_pools as make_pools
from ebm_ppl.handlers.surrogate import surrogate_normalizer as surrogate_normalizer

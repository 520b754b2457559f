"""Potentials: energies of one event, and ways to combine them."""

from ebm_ppl.potentials.boltzmann import RBM as RBM
from ebm_ppl.potentials.boltzmann import BoltzmannMachine as BoltzmannMachine
from ebm_ppl.potentials.combinators import Fixed as Fixed
from ebm_ppl.potentials.combinators import Normalized as Normalized
from ebm_ppl.potentials.combinators import Sum as Sum
from ebm_ppl.potentials.combinators import Tempered as Tempered
from ebm_ppl.potentials.combinators import Tilted as Tilted
from ebm_ppl.potentials.combinators import add as add
from ebm_ppl.potentials.combinators import temper as temper
from ebm_ppl.potentials.combinators import tilt as tilt
from ebm_ppl.potentials.combinators import trainable as trainable
from ebm_ppl.potentials.combinators import with_log_normalizer as with_log_normalizer
from ebm_ppl.potentials.combinators import without_base as without_base
from ebm_ppl.potentials.lattice import Ising as Ising
from ebm_ppl.potentials.lattice import Potts as Potts
from ebm_ppl.potentials.lipschitz import SpectralNorm as SpectralNorm
from ebm_ppl.potentials.lipschitz import spectral_norm_bound as spectral_norm_bound
from ebm_ppl.potentials.networks import MLP as MLP
from ebm_ppl.potentials.networks import Conv as Conv
from ebm_ppl.potentials.shallow import ShallowEnergy as ShallowEnergy
from ebm_ppl.potentials.short_run import ShortRun as ShortRun
from ebm_ppl.potentials.short_run import find_short_runs as find_short_runs

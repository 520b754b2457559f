"""Figures people look at. Needs the ``plots`` extra; each function returns a figure and shows nothing by itself."""

from ebm_ppl.plots.chains import autocorrelation as autocorrelation
from ebm_ppl.plots.chains import ess_evolution as ess_evolution
from ebm_ppl.plots.chains import trace as trace
from ebm_ppl.plots.energies import energy_drift as energy_drift
from ebm_ppl.plots.energies import energy_histogram as energy_histogram
from ebm_ppl.plots.images import image_grid as image_grid
from ebm_ppl.plots.images import inpainting as inpainting
from ebm_ppl.plots.log_normalizers import log_normalizer as log_normalizer
from ebm_ppl.plots.modes import mode_occupancy as mode_occupancy
from ebm_ppl.plots.planar import density as density
from ebm_ppl.plots.ranks import rank as rank
from ebm_ppl.plots.sampling_times import sampling_times as sampling_times

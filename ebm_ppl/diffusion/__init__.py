"""Diffusion samplers: a few Gaussian steps from noise to events, with trainable means and step sizes."""

from ebm_ppl.diffusion.networks import AtTime as AtTime
from ebm_ppl.diffusion.networks import TimeMLP as TimeMLP
from ebm_ppl.diffusion.networks import ValueNetwork as ValueNetwork
from ebm_ppl.diffusion.pretraining import denoising_loss as denoising_loss
from ebm_ppl.diffusion.pretraining import match_step_scales as match_step_scales
from ebm_ppl.diffusion.pretraining import pretrain as pretrain
from ebm_ppl.diffusion.sampler import BackwardKernel as BackwardKernel
from ebm_ppl.diffusion.sampler import DiffusionSampler as DiffusionSampler
from ebm_ppl.diffusion.sampler import Trajectory as Trajectory
from ebm_ppl.diffusion.sampler import cosine_signal as cosine_signal

"""Diffusion samplers: a few Gaussian steps from noise to events, with trainable means and step sizes."""

from ebm_ppl.diffusion.actor_critic import ActorCritic as ActorCritic
from ebm_ppl.diffusion.actor_critic import guide as guide
from ebm_ppl.diffusion.networks import AtTime as AtTime
from ebm_ppl.diffusion.networks import TimeMLP as TimeMLP
from ebm_ppl.diffusion.networks import ValueNetwork as ValueNetwork
from ebm_ppl.diffusion.player import actor_critic_optimizer as actor_critic_optimizer
from ebm_ppl.diffusion.player import adaptive_velocity as adaptive_velocity
from ebm_ppl.diffusion.pretraining import denoising_loss as denoising_loss
from ebm_ppl.diffusion.pretraining import match_step_scales as match_step_scales
from ebm_ppl.diffusion.pretraining import pretrain as pretrain
from ebm_ppl.diffusion.sampler import BackwardKernel as BackwardKernel
from ebm_ppl.diffusion.sampler import DiffusionSampler as DiffusionSampler
from ebm_ppl.diffusion.sampler import Trajectory as Trajectory
from ebm_ppl.diffusion.sampler import cosine_signal as cosine_signal

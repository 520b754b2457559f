"""Training and sampling with torchebm, timed here: one line of JSON in, one out.

Its own loss with a replay buffer, its own samplers, Adam, the energy of the benchmark. The buffer holds the chains and
nothing is added to the loss, so that the algorithm is that of ``ebm_ppl``.
"""

import json
import sys
import time

import torch
import torchebm
from torchebm.core import BaseModel
from torchebm.losses import PersistentContrastiveDivergence
from torchebm.samplers import HamiltonianMonteCarlo, LangevinDynamics


class Perceptron(BaseModel):
    """Two hidden layers under a standard normal base."""

    def __init__(self, width):
        super().__init__()
        nn = torch.nn
        hidden = [nn.Linear(2, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU()]
        self.net = nn.Sequential(*hidden, nn.Linear(width, 1, bias=False))

    def forward(self, x):
        return self.net(x).squeeze(-1) + 0.5 * x.square().sum(-1)


class Training:
    """Updates of one model, batch after batch of shuffled rows."""

    def __init__(self, width, num_chains, num_steps, step_size):
        torch.manual_seed(0)
        self.model = Perceptron(width)
        sampler = LangevinDynamics(self.model, step_size=step_size)
        self.loss = PersistentContrastiveDivergence(
            self.model,
            sampler,
            k_steps=num_steps,
            buffer_size=num_chains,
            init_steps=0,
            new_sample_ratio=0.0,
            energy_reg_weight=0.0,
        )
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=1e-3)
        num_rows, self.size = 8 * num_chains, num_chains
        side = 2.0 * torch.randint(0, 2, (num_rows, 1)) - 1.0
        self.rows = side + 0.5 * torch.randn(num_rows, 2)
        self.waiting = []

    def run(self, num_updates):
        for _ in range(num_updates):
            if not self.waiting:
                self.waiting = list(torch.randperm(len(self.rows)).split(self.size))
            self.optimizer.zero_grad()
            loss, _ = self.loss(self.rows[self.waiting.pop()])
            loss.backward()
            self.optimizer.step()


class Hamiltonian:
    """Trajectories of ten leapfrog steps of all chains."""

    def __init__(self, width, num_chains, num_steps, step_size):
        torch.manual_seed(0)
        self.sampler = HamiltonianMonteCarlo(Perceptron(width), step_size=step_size, n_leapfrog_steps=num_steps)
        self.chains = torch.randn(num_chains, 2)

    def run(self, num_trajectories):
        self.chains = self.sampler.sample(x=self.chains, n_steps=num_trajectories)


def main():
    print(json.dumps({"torchebm": torchebm.__version__, "torch": torch.__version__}), flush=True)
    kinds, tasks = {"training": Training, "hmc": Hamiltonian}, {}
    for line in sys.stdin:
        question = json.loads(line)
        torch.set_num_threads(question["threads"])
        case = question["kind"], question["width"], question["chains"], question["steps"], question["step_size"]
        if case not in tasks:
            tasks[case] = kinds[case[0]](*case[1:])
        start = time.perf_counter()
        tasks[case].run(question["count"])
        print(json.dumps({"seconds": time.perf_counter() - start}), flush=True)


if __name__ == "__main__":
    main()

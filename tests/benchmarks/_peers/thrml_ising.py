"""Block Gibbs sampling of a periodic Ising model with thrml, timed here: one line of JSON in, one out."""

import importlib.metadata
import json
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
from thrml import Block, SamplingSchedule, SpinNode, sample_states
from thrml.models import IsingEBM, IsingSamplingProgram, hinton_init


class Lattice:
    """Chains on a square lattice that closes on itself, its two colours the two blocks."""

    def __init__(self, size, coupling, num_chains):
        nodes = [[SpinNode() for _ in range(size)] for _ in range(size)]
        flat = [node for row in nodes for node in row]
        edges = [(nodes[i][j], nodes[(i + 1) % size][j]) for i in range(size) for j in range(size)]
        edges += [(nodes[i][j], nodes[i][(j + 1) % size]) for i in range(size) for j in range(size)]
        weights = jnp.full(len(edges), coupling)
        model = IsingEBM(flat, edges, jnp.zeros(len(flat)), weights, jnp.array(1.0))
        colours = [[nodes[i][j] for i in range(size) for j in range(size) if (i + j) % 2 == c] for c in (0, 1)]
        self.blocks = [Block(colour) for colour in colours]
        self.program = IsingSamplingProgram(model, self.blocks, clamped_blocks=[])
        self.size, self.key = size, jax.random.key(0)
        self.state = hinton_init(jax.random.key(1), model, self.blocks, (num_chains,))
        self.num_chains, self.compiled = num_chains, {}

    def _sweeps(self, num_sweeps):
        schedule = SamplingSchedule(n_warmup=num_sweeps, n_samples=1, steps_per_sample=1)

        def one_chain(key, state):
            last = sample_states(key, self.program, schedule, state, [], self.blocks)
            return [block[0] for block in last]

        return jax.jit(jax.vmap(one_chain))

    def run(self, num_sweeps):
        if num_sweeps not in self.compiled:
            self.compiled[num_sweeps] = self._sweeps(num_sweeps)
        self.key, key = jax.random.split(self.key)
        keys = jax.random.split(key, self.num_chains)
        self.state = jax.block_until_ready(self.compiled[num_sweeps](keys, self.state))

    def correlation(self):
        """Mean product of neighbours, one number that both libraries must agree on."""
        spins = np.zeros((self.num_chains, self.size, self.size))
        parity = np.indices((self.size, self.size)).sum(axis=0) % 2
        for colour, block in enumerate(self.state):
            spins[:, parity == colour] = 2.0 * np.asarray(block) - 1.0
        return float(0.5 * sum((spins * np.roll(spins, 1, axis=axis)).mean() for axis in (1, 2)))


def main():
    print(json.dumps({name: importlib.metadata.version(name) for name in ("thrml", "jax")}), flush=True)
    lattices = {}
    for line in sys.stdin:
        question = json.loads(line)
        case = question["size"], question["coupling"], question["chains"]
        if case not in lattices:
            lattices[case] = Lattice(*case)
        start = time.perf_counter()
        lattices[case].run(question["sweeps"])
        seconds = time.perf_counter() - start
        print(json.dumps({"seconds": seconds, "correlation": lattices[case].correlation()}), flush=True)


if __name__ == "__main__":
    main()

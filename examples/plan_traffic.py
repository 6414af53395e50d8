"""Does a shared prompt prefix or a smaller dtype shorten the queue? A simulated morning, a few seconds of work.

python examples/plan_traffic.py
"""

import random

from kvbits.codecs import PoolLayout, parse_policy
from kvbits.planning.facts import known_facts
from kvbits.planning.memory import weights_bytes
from kvbits.planning.simulate import EngineLimits, simulate
from kvbits.planning.timing import Machine, StepTime
from kvbits.traces import Arrival


def morning(requests: int, shared: bool) -> list[Arrival]:
    """Two requests a second: 6,000 to 14,000 prompt tokens, of which the first 4,096 may be the same for all."""
    rng, time, found = random.Random(0), 0.0, []
    for index in range(requests):
        time += rng.expovariate(2.0)
        prompt = rng.randint(6_000, 14_000)
        count = -(-prompt // 512)
        own = [1000 + 100 * index + i for i in range(count)]
        blocks = tuple(range(8)) + tuple(own[8:]) if shared else tuple(own)
        found.append(Arrival(time, prompt, rng.randint(100, 600), blocks))
    return found


def main() -> None:
    """Simulate six mornings and print."""
    facts = known_facts("llama-3.1-8b")
    geometry, weights = facts.geometry, weights_bytes(facts.parameters, "bf16")
    memory = (40 << 30) - weights
    for shared in (False, True):
        trace = morning(300, shared)
        for dtype in ("bf16", "int8", "int4"):
            layout = PoolLayout.of(geometry, parse_policy(dtype, geometry.num_layers))
            frames = layout.frames_in(memory)
            machine = Machine(bandwidth=2.7e12, flops=400e12)
            step = StepTime.of(machine, facts, geometry, weights, layout.bytes_per_token, 1)
            found = simulate(trace, layout, frames, geometry.max_position, step, EngineLimits(256, 2048)).as_json()
            print(
                f"{'shared prefix' if shared else 'all different':>14}, {dtype:>4}: waited {found['waited']:3} of 300, "
                f"mean wait {found['wait_mean_s']:5.1f} s, pool {100 * found['mean_use']:3.0f} % used, "
                f"{100 * found['prefix_hit_share']:4.1f} % of prompt tokens found"
            )


if __name__ == "__main__":
    main()

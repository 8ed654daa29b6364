"""What the tests' fork server does before it forks workers: import everything, and draw a first picture."""

from mw_envs import Trial
from mw_envs.rendering import View, get_renderer
from mw_envs.simulation.scene import Simulator
from mw_envs.vector import worker  # noqa: F401
from sb3_vla.data import collecting  # noqa: F401

simulator = Simulator("reach-v3")
simulator.place(Trial("reach-v3", 0, 0))
get_renderer("software").render(simulator.model, simulator.data, View("corner2", 16, 16), simulator.scene)

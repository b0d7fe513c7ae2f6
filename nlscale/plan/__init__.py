"""What a configuration will do on a cluster, before renting it (no torch is imported)."""

from nlscale.cluster.machines import Cluster, load_cluster
from nlscale.plan.memory import Memory, RankMemory, memory
from nlscale.plan.plan import Plan, make_plan
from nlscale.plan.traffic import Traffic, traffic

__all__ = [
    "Cluster",
    "Memory",
    "Plan",
    "RankMemory",
    "Traffic",
    "load_cluster",
    "make_plan",
    "memory",
    "traffic",
]

"""What a configuration will do on a cluster, before renting it (no torch is imported)."""

from nlscale.plan.cluster import Cluster, load_cluster
from nlscale.plan.plan import Plan, make_plan
from nlscale.plan.traffic import Traffic, group_parameters, traffic

__all__ = [
    "Cluster",
    "Plan",
    "Traffic",
    "group_parameters",
    "load_cluster",
    "make_plan",
    "traffic",
]

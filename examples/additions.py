"""Importing this module adds a mixer, an optimizer rule and an evaluation to nlscale.

It names them and imports no torch: what makes them is imported when they are made.
"""

from examples.retention.facts import RetentionFacts
from nlscale.evaluate import table as evaluations
from nlscale.model.mixers import table as mixers
from nlscale.optim import table as rules

mixers.register("retention", RetentionFacts())
rules.register("lion", rules.Rule("examples.lion:lion", state=("momentum",)))
evaluations.register("backwards", evaluations.Evaluation("examples.backwards:backwards"))

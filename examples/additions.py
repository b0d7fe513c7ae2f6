"""Importing this module adds a mixer, optimizer rules and two evaluations to nlscale.

It names them and imports no torch: what makes them is imported when they are made.
"""

from examples.retention.facts import RetentionFacts
from nlscale.evaluate import table as evaluations
from nlscale.evaluate import trained
from nlscale.model.mixers import table as mixers
from nlscale.optim import table as rules

mixers.register("retention", RetentionFacts())
rules.register("lion", rules.Rule("examples.lion:lion", state=("momentum",)))
rules.register(
    "heavy-ball",
    rules.Rule("examples.heavy_ball:HeavyBall", state=("momentum",), whole_matrices=True),
)
evaluations.register("backwards", evaluations.Evaluation("examples.backwards:backwards"))
trained.register(
    "guesses",
    trained.Trained(
        help="how often the most likely token is the one that follows",
        description="Which share of the tokens of held-out text a model guesses.",
        arguments="examples.guesses.shown:add_arguments",
        made_by="examples.guesses.asked:evaluate",
        shown_by="examples.guesses.shown:show",
    ),
)

"""What a package beside nlscale can add to it: a mixer, an optimizer rule, an evaluation.

nlscale train recipes/quickstart.yaml model.mixer=retention --import examples.additions
"""

"""How large each part of the model is, from the configuration alone (no tensors).

The widths are chosen here, so that mixers compare at equal parameters: mixer and CMS of a block
together are as large as a Transformer block of the same width, 12 d_model^2 **[choice]**.
"""

from __future__ import annotations

from nlscale.config.vocabulary import Config
from nlscale.errors import UserError
from nlscale.model.mixers.table import mixer

_BLOCK_BUDGET = 12  # a Transformer block: 4 d^2 of attention and 8 d^2 of feed-forward
_HIDDEN_MULTIPLE = 8  # hidden widths are rounded to this


def level_hidden(config: Config) -> list[int]:
    """Hidden units of each level's MLP in a block, fastest level first.

    Raises:
        UserError: the mixer leaves no room, or given widths exceed the total.
    """
    model, spectrum = config.model, config.levels.spectrum
    given = [level.hidden for level in spectrum]
    chosen = sum(h for h in given if h is not None)
    open_levels = given.count(None)
    if open_levels == 0:
        if model.hidden not in (None, chosen):
            raise UserError(
                f"model.hidden {model.hidden} is not the sum of the levels' own, {chosen}; "
                f"leave it null"
            )
        return [h for h in given if h is not None]
    total = model.hidden
    if total is None:
        left = _BLOCK_BUDGET * model.d_model**2 - mixer(model.mixer).parameters(model)
        total = round(left / (3 * model.d_model))
    # in units of the multiple, the first levels take one more where it does not come out even
    units, more = divmod(round((total - chosen) / _HIDDEN_MULTIPLE), open_levels)
    if units < 1:
        raise UserError(
            f"model.hidden: {total} units leave {max(0, total - chosen)} for the levels without a "
            f"width of their own, {open_levels} in number; use fewer levels, a larger d_model or "
            f"set model.hidden"
        )
    widths = iter([(units + (i < more)) * _HIDDEN_MULTIPLE for i in range(open_levels)])
    return [next(widths) if h is None else h for h in given]


def level_parameters(config: Config, vocabulary: int) -> list[int]:
    """Parameters of each level over the whole model, fastest first.

    Everything outside the CMS MLPs (mixers, norms, embedding, head) belongs to the first.
    """
    model = config.model
    d, k = model.d_model, len(config.levels.spectrum)
    independent = model.cms.value == "independent"
    counts = [
        model.layers * (3 * d * hidden + (d if not independent else 0))
        for hidden in level_hidden(config)
    ]
    mixture = k if k > 1 else 0
    counts[0] += model.layers * (
        mixer(model.mixer).parameters(model) + (d + mixture if independent else 0)
    )
    counts[0] += tables(config) * vocabulary * d + d
    return counts


def level_matrices(config: Config) -> list[dict[tuple[int, int], int]]:
    """How many matrices of each shape [out, in] a block has, by level, fastest first.

    What rules over whole matrices take (`nlscale.optim.table`); neither embedding nor head.
    """
    d, found = config.model.d_model, []
    for hidden in level_hidden(config):
        shapes = {(hidden, d): 2}
        shapes[d, hidden] = shapes.get((d, hidden), 0) + 1
        found.append(shapes)
    for shape, number in mixer(config.model.mixer).matrices(config.model).items():
        found[0][shape] = found[0].get(shape, 0) + number
    return found


def tables(config: Config) -> int:
    """Matrices of vocabulary x d_model: the embedding and the head, or one that is both."""
    return 1 if config.model.tie_embeddings else 2


def non_embedding_parameters(config: Config, vocabulary: int) -> int:
    """Parameters of the model without those of the embedding, which is looked up, not computed.

    The head counts: every token pays for its product, also where it is the embedding. Kaplan et al.
    2020 leave it out too, being the embedding once more, which bends laws of small models (Porian
    et al. 2024; Pearce & Song 2024).
    """
    looked_up = (tables(config) - 1) * vocabulary * config.model.d_model
    return sum(level_parameters(config, vocabulary)) - looked_up

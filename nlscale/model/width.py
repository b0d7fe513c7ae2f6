"""Hyperparameters that carry over from a narrow model to a wide one: muP, for Hope.

The maximal update parametrisation (Yang et al. 2022, "Tensor Programs V", arXiv 2203.03466) in the
form of its Table 8, for AdamW. With m = d_model / model.mup_base_width, at a constant head size and
with the widths of the CMS in proportion to d_model, so that there are m times as many heads:

    parameters                                initial std    learning rate    weight decay
    project, output of a mixer; up, down of
      a CMS MLP: inputs grow with the width   x 1/sqrt(m)    x 1/m            x m
    embedding; head                           as it is       as it is         as it is
    norms, read_norm, biases, lambda, gamma,
      noise, momentum, CMS mixture            as it is       as it is         none
    convolution, memories M_k, M_v, M_m,
      m_eta, m_alpha, maps of what is read
      off S, up to gates of channels:
      inputs do not grow                      as it is       as it is         as it is

and logits are divided by m, Adam's eps too. At m = 1 all of it is the standard parametrisation, bit
for bit; what a level's own learning rate and period rule say multiplies on top.

- *Memories* live inside a head: at a constant head size they are the same function at every width,
  as is softmax attention, whose logits keep 1/sqrt(head size). A head size that grows would call
  for 1/(head size) and is refused where it shows: the base width must be whole heads of this size.
- *Static gates* are rows of `project`: a logit sums over d_model inputs, like any of its outputs.
- *Weight decay*: AdamW multiplies it by the learning rate; m keeps the product, and so the steps
  over which a weight forgets, the same at every width **[choice]** (as MuAdamW of the muP package;
  Wang and Aitchison 2024, arXiv 2405.13698; the "independent" decay of Wortsman et al. 2023,
  arXiv 2309.14322, has this property too).
- *eps*: dividing the logits divides every gradient by m; eps in proportion keeps Adam's step.
- *Clipping* needs no rule: the norm of m^2 gradients of 1/m each does not grow with the width.
- *init_std* carries over as well, a bad one too: tune it with the learning rate. The default suits
  the standard parametrisation of widths in the hundreds and is small for a base of 64.
- Logits start as 1/sqrt(m): a wide model begins even closer to knowing nothing.
"""

from __future__ import annotations

from nlscale.config.vocabulary import ModelConfig


def width_multiplier(model: ModelConfig) -> float:
    """m: how many times as wide the model is as where its hyperparameters were tuned."""
    return 1.0 if model.mup_base_width is None else model.d_model / model.mup_base_width

"""The arithmetic that training needs, whatever a program does beside it."""

from flaxcap.config import Model


def forward(model: Model, *, images: int, tokens: int, positions: int, feature_dim: int, vocabulary: int) -> int:
    """Floating-point operations (a multiplication and an addition are two) of the matrix products of a forward pass.

    Once an image, whatever the number of its captions: the projection of its grid, and the attention's keys. Once a
    token that is predicted, <pad> left out: the recurrent product (query and gates), the scores, the context, the
    context's and the word's part of the gates, and the two output layers. Elementwise arithmetic does not count.
    """
    m = model
    carried = 2 if m.cell == "lstm" else 1
    gates = (3 if m.cell == "gru" else 4) * m.hidden_dim
    image = positions * (feature_dim * m.image_dim + m.image_dim * m.attention_dim)
    if m.initial_state == "mean":
        image += m.image_dim * m.hidden_dim * carried
    token = m.hidden_dim * (m.attention_dim + gates)
    token += positions * (m.attention_dim + m.image_dim)
    token += (m.image_dim + m.embedding_dim) * gates
    states = m.hidden_dim + (m.image_dim + m.embedding_dim if m.output == "deep" else 0)
    token += states * m.head_dim + m.head_dim * vocabulary
    if m.attention_gate:
        token += m.hidden_dim
    return 2 * (images * image + tokens * token)


def training(model: Model, **sizes: int) -> int:
    """Of a step: a backward pass takes two products for each of the forward pass.

    (The features take no gradient, so the first product has one less; it is counted all the same, as is usual.)
    """
    return 3 * forward(model, **sizes)

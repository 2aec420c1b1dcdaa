"""Captioners in PyTorch: `GruCaptioner` is flaxcap's default model, `ShowAttendTell` an LSTM with a gated context."""

import torch
import torch.nn.functional as F
from torch import nn
from workload import EMBEDDING, FEATURES, POSITIONS, UNITS, VOCABULARY


class GruCaptioner(nn.Module):
    """A projection of the image, additive attention, a GRU and two output layers: flaxcap's default sizes."""

    def __init__(self):
        super().__init__()
        self.project = nn.Linear(FEATURES, EMBEDDING)
        self.keys, self.query = nn.Linear(EMBEDDING, UNITS), nn.Linear(UNITS, UNITS)
        self.score = nn.Linear(UNITS, 1)
        self.embedding = nn.Embedding(VOCABULARY, EMBEDDING)
        self.cell = nn.GRUCell(2 * EMBEDDING, UNITS)
        self.head, self.vocabulary = nn.Linear(UNITS, UNITS), nn.Linear(UNITS, VOCABULARY)

    def encode(self, image):
        """Returns what every step reads: values `[B, P, 256]` and attention keys `[B, P, 512]`."""
        values = F.relu(self.project(image))
        return values, self.keys(values)

    def start(self, image):
        values, keys = self.encode(image)
        return (values, keys), (values.new_zeros(len(image), UNITS),)

    def step(self, word, memory, state):
        """Returns the state after one word; `word` is `[B, 256]`."""
        (values, keys), (hidden,) = memory, state
        score = self.score(torch.tanh(keys + self.query(hidden).unsqueeze(1))).squeeze(-1)
        weights = torch.softmax(score, 1).to(values.dtype)
        context = torch.bmm(weights.unsqueeze(1), values).squeeze(1)
        return (self.cell(torch.cat([context, word.to(context.dtype)], 1), hidden),)

    def logits(self, state):
        return self.vocabulary(self.head(state[0]))

    def loss(self, image, tokens):
        """Returns the sum of the real tokens' losses, divided by the number of captions."""
        memory, state = self.start(image)
        words, states = self.embedding(tokens[:, :-1]), []
        for t in range(tokens.shape[1] - 1):
            state = self.step(words[:, t], memory, state)
            states.append(state[0])
        logits = self.logits((torch.stack(states, 1),))
        targets = tokens[:, 1:].reshape(-1)
        total = F.cross_entropy(logits.flatten(0, 1), targets, ignore_index=0, reduction="sum")
        return total / len(tokens)


class ShowAttendTell(nn.Module):
    """The LSTM of the well-known PyTorch captioning tutorial, written from its published description.

    Additive attention with a relu over the 2,048 features themselves, a sigmoid gate on the context, dropout 0.5.
    Captions are sorted by decreasing length, and the batch shrinks as they end.
    """

    def __init__(self, embedding=512, attention=512, units=512):
        super().__init__()
        self.keys, self.query = nn.Linear(FEATURES, attention), nn.Linear(units, attention)
        self.score = nn.Linear(attention, 1)
        self.embedding = nn.Embedding(VOCABULARY, embedding)
        self.dropout = nn.Dropout(0.5)
        self.cell = nn.LSTMCell(embedding + FEATURES, units)
        self.hidden, self.carry = nn.Linear(FEATURES, units), nn.Linear(FEATURES, units)
        self.gate, self.vocabulary = nn.Linear(units, FEATURES), nn.Linear(units, VOCABULARY)

    def start(self, image):
        mean = image.mean(1)
        return (image,), (self.hidden(mean), self.carry(mean))

    def attend(self, image, hidden):
        score = self.score(torch.relu(self.keys(image) + self.query(hidden).unsqueeze(1))).squeeze(2)
        weights = torch.softmax(score, 1)
        return (image * weights.unsqueeze(2)).sum(1), weights

    def attended_step(self, word, image, state):
        """Returns the state after one word, and the attention weights."""
        context, weights = self.attend(image, state[0])
        context = torch.sigmoid(self.gate(state[0])) * context
        return self.cell(torch.cat([word, context], 1).to(state[0].dtype), state), weights

    def step(self, word, memory, state):
        return self.attended_step(word, memory[0], state)[0]

    def logits(self, state):
        return self.vocabulary(state[0])

    def loss(self, image, tokens, lengths):
        """Returns the mean loss of the real tokens plus the doubly stochastic penalty; `lengths` decrease."""
        steps = [length - 1 for length in lengths]
        words, (_, state) = self.embedding(tokens), self.start(image)
        logits = image.new_zeros(len(steps), max(steps), VOCABULARY)
        weights = image.new_zeros(len(steps), max(steps), POSITIONS)
        for t in range(max(steps)):
            left = sum(count > t for count in steps)
            state, now = self.attended_step(words[:left, t], image[:left], tuple(x[:left] for x in state))
            logits[:left, t] = self.vocabulary(self.dropout(state[0])).to(logits.dtype)
            weights[:left, t] = now.to(weights.dtype)
        logits, targets = (
            nn.utils.rnn.pack_padded_sequence(x, steps, batch_first=True).data
            for x in (logits, tokens[:, 1 : max(steps) + 1])
        )
        return F.cross_entropy(logits, targets) + ((1.0 - weights.sum(1)) ** 2).mean()

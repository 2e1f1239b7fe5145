"""What a model says of whole texts: its own next-token law at each token of a completion, and nothing about it is changed."""

import pytest
import torch
from tiny import VOCAB, tiny_model

from switchkd.base.errors import ModelError
from switchkd.forward.head import Scorer
from switchkd.runner.architecture import beyond_context, context_length

ROWS = [([3, 4, 5], [6, 7]), ([9], [8, 2, 4, 1]), ([2, 2, 3], [5])]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_scorer_says_what_the_model_says_of_each_text_alone(family):
    model = tiny_model(family).train()
    scorer = Scorer(model, VOCAB)
    hidden = scorer.hidden(ROWS)
    assert not hidden.requires_grad and model.training
    model.eval()
    with torch.no_grad():
        alone = [
            model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1] for prompt, completion in ROWS
        ]
    expected = torch.cat(alone)[:, :VOCAB].log_softmax(-1)
    torch.testing.assert_close(scorer.log_probs(hidden), expected, atol=1e-9, rtol=1e-9)


def test_a_text_fits_into_the_context_to_the_last_token():
    model = tiny_model("gpt2")
    most = int(context_length(model))
    assert beyond_context(most, "model's", model) == ""
    assert beyond_context(most + 1, "model's", model) == f"exceed the model's context of {most}"
    scorer = Scorer(model, VOCAB)
    assert len(scorer.hidden([([3], [4] * (most - 1))])) == most - 1
    with pytest.raises(ModelError, match=rf"{most + 1} tokens exceed the model's context of {most}; lower max_prompt"):
        scorer.hidden([([3], [4] * most)])

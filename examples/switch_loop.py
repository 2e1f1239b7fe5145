"""SWITCH, flat: the whole idea in one file of plain PyTorch, to read or to take apart.

    python examples/switch_loop.py                # a few steps on the demo pair
    python examples/switch_loop.py --steps 20 --rows 4

At every position both models give their next-token distribution. Where they disagree by more than tau(t), the teacher writes
the token, otherwise the student does; tau falls with the position. The student is then trained on that text to be closer to
the teacher at every token. The library does the same with one teacher call for several tokens, for many rows at once, in
runs that can be resumed (`switchkd train switch`).

Koo et al., SWITCH, Findings of NAACL 2025, arXiv 2410.19503. Letters in shapes: V vocabulary, T response tokens.
"""

import argparse
import math

import torch
from torch import Tensor
from transformers import DynamicCache

from switchkd import load_pair
from switchkd.data.examples import load_examples
from switchkd.runner.cache import CACHE


def jsd_in_bits(p: Tensor, q: Tensor) -> float:
    """Jensen-Shannon divergence of two distributions [V], between 0 and 1."""
    m = (p + q) / 2
    halves = [torch.special.xlogy(x, x).sum() - torch.special.xlogy(x, m).sum() for x in (p, q)]
    return float(sum(halves)) / 2 / math.log(2)


def threshold(t: int, tau_0: float = 1.0, decay: float = 0.1) -> float:
    """tau(t) = tau_0 · exp(−decay · t): the longer the text, the sooner the teacher steps in."""
    return tau_0 * math.exp(-decay * t)


class Reader:
    """A model that reads a text token by token and predicts the next one."""

    def __init__(self, model):
        self.model, self.cache = model, DynamicCache(config=model.config)

    def next_distribution(self, new_ids: list[int]) -> Tensor:
        output = self.model(torch.tensor([new_ids]), use_cache=True, logits_to_keep=1, **{CACHE: self.cache})
        return output.logits[0, -1].float().softmax(-1)


@torch.no_grad()
def switched_text(student, teacher, prompt: list[int], end_ids: set[int], budget: int, generator) -> tuple[list, list]:
    """Let the two write together; returns the tokens and who wrote each (0 student, 1 teacher)."""
    readers = Reader(student), Reader(teacher)
    new, text, speakers = prompt, [], []
    for t in range(budget):
        q, p = (reader.next_distribution(new) for reader in readers)
        teacher_speaks = jsd_in_bits(p, q) > threshold(t)
        token = int(torch.multinomial(p if teacher_speaks else q, 1, generator=generator))
        text.append(token)
        speakers.append(int(teacher_speaks))
        if token in end_ids:
            break
        new = [token]
    return text, speakers


def skew_reverse_kl(logp: Tensor, logq: Tensor, alpha: float = 0.1) -> Tensor:
    """KL(q ‖ (1−alpha) p + alpha q) at each of T tokens, from log-probabilities [T, V] (DistiLLM, arXiv 2402.03898)."""
    mixture = torch.logaddexp(logp + math.log(1 - alpha), logq + math.log(alpha))
    return (logq.exp() * (logq - mixture)).sum(-1)


def response_log_probs(model, prompt: list[int], text: list[int]) -> Tensor:
    """Log-probabilities [T, V] that predict the response: the logits one position before each of its tokens."""
    logits = model(torch.tensor([prompt + text]), logits_to_keep=len(text) + 1).logits[0, :-1]
    return logits.float().log_softmax(-1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", default="demo")
    parser.add_argument("--student", default="demo")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--rows", type=int, default=2, help="texts in one step")
    parser.add_argument("--budget", type=int, default=48, help="tokens in one text")
    args = parser.parse_args()

    pair = load_pair(args.teacher, args.student)
    student, teacher, tokenizer = pair.student, pair.teacher, pair.tokenizer
    optimizer = torch.optim.AdamW(student.parameters(), lr=3e-4)
    generator = torch.Generator().manual_seed(0)
    questions = [example.messages[-1].content for example in load_examples("gsm8k-sample:train")]

    for step in range(args.steps):
        losses, tokens = [], 0
        for row in range(args.rows):
            question = [{"role": "user", "content": questions[step * args.rows + row]}]
            prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_dict=False)
            text, speakers = switched_text(student, teacher, prompt, set(pair.eos_token_ids), args.budget, generator)
            with torch.no_grad():
                logp = response_log_probs(teacher, prompt, text)
            losses.append(skew_reverse_kl(logp, response_log_probs(student, prompt, text)).sum())
            tokens += len(text)
        loss = torch.stack(losses).sum() / tokens  # one mean over all tokens of the step, not over rows
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step + 1}: loss {loss.item():.3f}, teacher wrote {sum(speakers)} of the last {len(text)} tokens")
        print("   ", repr(tokenizer.decode(text))[:100])


if __name__ == "__main__":
    main()

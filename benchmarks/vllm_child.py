"""vLLM in an environment of its own: a line of JSON on the standard input asks for text, a line on the standard output answers.

``benchmarks.engines`` runs this file with another Python, so that it imports nothing of this project. Asked is
``{"prompts": [[ids]], "new_tokens": n}``; answered ``{"seconds": s, "lengths": [tokens]}``, s being those of ``generate`` alone.
The first line says the version, once the model is ready.
"""

import json
import os
import sys
import time


def main(folder: str, longest: int, rows: int) -> None:
    """Serve the model in ``folder`` for texts of at most ``longest`` tokens, ``rows`` together, until the input ends."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what vLLM prints is none
    from vllm import LLM, SamplingParams, __version__

    model = LLM(
        folder,
        dtype="float32",
        enforce_eager=True,
        max_model_len=longest,
        max_num_seqs=rows,
        enable_prefix_caching=False,
        disable_log_stats=True,
    )
    answers.write(json.dumps({"version": __version__}) + "\n")
    for line in sys.stdin:
        asked = json.loads(line)
        prompts = [{"prompt_token_ids": ids} for ids in asked["prompts"]]
        settings = SamplingParams(
            temperature=1.0, top_p=1.0, top_k=0, ignore_eos=True, max_tokens=asked["new_tokens"], detokenize=False
        )
        start = time.perf_counter()
        texts = model.generate(prompts, settings, use_tqdm=False)
        seconds = time.perf_counter() - start
        answer = {"seconds": seconds, "lengths": [len(text.outputs[0].token_ids) for text in texts]}
        answers.write(json.dumps(answer) + "\n")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))

"""Run by a Python that has vLLM, and by nothing of this project: reads one JSON line of work, then runs on each line.

Every answer is one JSON line on the file descriptor that stdout was; what vLLM prints goes to stderr.
"""

import json
import os
import sys
import time


def main() -> None:
    """Load the model, say ready, then answer each line with seconds, tokens and the first token's times."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    work = json.loads(sys.stdin.readline())
    from vllm import LLM, SamplingParams

    engine = LLM(
        model=work["model"],
        dtype=work["dtype"],
        max_model_len=work["longest"],
        max_num_seqs=len(work["prompts"]),
        enable_prefix_caching=False,
        disable_log_stats=False,
    )
    options = SamplingParams(temperature=0.0, max_tokens=work["tokens"], ignore_eos=True, detokenize=False)
    prompts = [{"prompt_token_ids": ids} for ids in work["prompts"]]
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        outputs = engine.generate(prompts, options, use_tqdm=False)
        seconds = time.perf_counter() - start
        first = [getattr(one.metrics, "first_token_latency", None) for one in outputs]
        tokens = sum(len(one.outputs[0].token_ids) for one in outputs)
        answer = {"seconds": seconds, "tokens": tokens, "first": [wait for wait in first if wait]}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
